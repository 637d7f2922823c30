"""What the verbs print that look at folders or send them: show, check, report, push, recipes."""

from __future__ import annotations

from typing import Any, Literal

from llmsqueeze.cli.schema.fields import BITS, BITS_PER_WEIGHT, OUT, Described, Printed, always, sometimes

FOLDER = always("The folder, as it was named.")


class ShowRow(Described):
    """Linears whose names differ only by a number, and that are compressed alike."""

    pattern: str = always("Their name, with `*` for the number.")
    count: int = always("How many there are.")
    blocks: list[int] = always("The blocks that they are in; empty if they are in none.")
    parts: str = always("What each is made of, in words.")
    weights: int = always("Their weights.")
    nbytes: int = always("Their bytes.")
    beside: bool = always("Whether they are of other towers, embeddings or the head, which no budget of bits counts.")
    bits_per_weight: float = always("Their bits per weight.")


class Show(Printed):
    """`llmsqueeze show FOLDER`: the contents of a compressed folder."""

    verb: Literal["show"] = always("Name of the verb.")
    path: str = FOLDER
    model: str | None = always("The original; null if the folder does not tell.")
    method: str | None = always("The method; null if the folder does not tell.")
    bits: float = BITS
    recipe: dict[str, Any] = always("The settings that make the folder again, by their names in a recipe file.")
    rows: list[ShowRow] = always("The linears.")
    nbytes: int = always("Bytes of all weights.")
    kept_nbytes: int = always("Bytes of those that stayed as they were.")
    nbytes_original: int | None = always("Bytes of all weights of the original; null if the folder does not tell.")
    plane_zeros: list[float] | None = always("Share of zeros in each of two binary planes; null if there are none.")
    distillation: list[dict[str, Any]] = always("The folder's record of each distillation.")
    bits_per_weight: float = BITS_PER_WEIGHT


class Unfinished(Printed):
    """`llmsqueeze show FOLDER.partial`: how far a run is, by the last line of its log."""

    verb: Literal["show"] = always("Name of the verb.")
    path: str = FOLDER
    process: int = always("The process that writes the folder.")
    runs: bool = always("Whether it is still there.")
    stage: str | None = always("What it does.")
    done: int = always("Steps of the stage that are done.")
    total: int = always("Steps of the stage.")
    weight: str | None = always("The weight that was rounded last; null if there is none.")
    sample: int | None = always("The sample that was read last; null if there is none.")
    samples: int | None = always("Samples of the stage; null if it has none.")
    memory_mb: float = always("Memory of the process, in MB.")
    seconds: float = always("Since the stage began.")
    quiet_seconds: float = always("Since the last line of the log.")
    left_seconds: float | None = always("Of the stage; null before its first step is done.")
    note: str | None = always("The last note; null if there is none.")


class Check(Printed):
    """`llmsqueeze check`: whether a folder is whole, and what opens it."""

    verb: Literal["check"] = always("Name of the verb.")
    folder: str = FOLDER
    format: str = always("Its format; `unknown` if that cannot be told.")
    sound: bool = always("Whether it is known to be sound.")
    state: Literal["sound", "not sound", "cannot tell"] = always("The same in words.")
    unknown: str = always("Why it cannot be told; else empty.")
    errors: list[str] = always("What is wrong.")
    verdicts: dict[str, str] = always("Runtime -> why it does not open the folder; empty if it should.")
    notes: list[str] = always("What else there is to know.")


class Report(Printed):
    """`llmsqueeze report`: the page that was written."""

    verb: Literal["report"] = always("Name of the verb.")
    folder: str = FOLDER
    out: str = OUT
    nbytes: int = always("Bytes of the page.")
    linears: int = always("Compressed linears of the folder.")
    evaluated: bool = always("Whether the page shows scores.")
    compared: bool = always("Whether the page shows a comparison.")


class Push(Printed):
    """`llmsqueeze push`: what was sent, or would be."""

    verb: Literal["push"] = always("Name of the verb.")
    repo: str = always("The repository on the Hub.")
    url: str = always("Its page.")
    private: bool | None = always("Whether it is private; null in a dry run if a push would leave it as it is.")
    files: dict[str, int] = always("File -> its bytes.")
    nbytes: int = always("Bytes of all files.")
    there: list[str] = always("Files of weights that the Hub had already, and that were not sent.")
    dry_run: bool = always("Whether nothing was sent.")
    card: str | None = sometimes("Of a dry run: the model card.")


class RecipeLine(Described):
    """A bundled recipe."""

    name: str = always("What `--recipe` takes.")
    purpose: str = always("What it is for.")


class Recipes(Printed):
    """`llmsqueeze recipes`: the bundled recipes."""

    verb: Literal["recipes"] = always("Name of the verb.")
    recipes: list[RecipeLine] = always("All of them.")
