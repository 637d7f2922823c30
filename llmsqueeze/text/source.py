"""What `--calibration` and `--text` name: a file, a folder, a data set on the Hub, the demo; or several with shares."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from llmsqueeze.errors import CalibrationError, nearest
from llmsqueeze.text.data_sets import read_folder, read_hub
from llmsqueeze.text.document import Text
from llmsqueeze.text.files import COMPRESSIONS, ROWS, read_file

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
DEMO = "demo"
SELF = "self"  # the calibration source that means: the model generates the text (model/sampling.py)
SHARE = re.compile(r"(?P<name>.+):(?P<share>\d*\.?\d+)")


def calibration_texts(
    source: str | None, model: str, field: str | None = None, enough: int | None = None
) -> list[Text]:
    """The texts that `--calibration` names; if it names none, the demo's own for the demo, else WikiText-2 train.

    field: the one that has the text, if the user says so. enough: characters of each that suffice.
    Raises CalibrationError if a text cannot be used, HubError if the Hub cannot be reached.
    """
    if source is None:
        source = DEMO if model == DEMO else WIKITEXT
    named = shares(source)
    if len(named) > 1 and any(name == SELF for name, _ in named):
        raise CalibrationError(f"--calibration {source}: {SELF} cannot stand beside other texts")
    return [replace(read_text(name, "train", field, enough), share=share) for name, share in named]


def evaluation_text(source: str | None, model: str, field: str | None = None) -> Text:
    """The text that `--text` names; if it names none, the demo's own for the demo, else WikiText-2 test."""
    if source is None:
        source = DEMO if model == DEMO else WIKITEXT
    return read_text(source, "test", field)


def shares(source: str) -> list[tuple[str, float]]:
    """The texts of a source and their shares: `a.jsonl:0.7,b.parquet:0.3`, or without shares if they are equal.

    Raises CalibrationError if some have a share and others none.
    """
    if _path(source).exists() or "," not in source:
        return [(source, 1.0)]
    pieces = [piece.strip() for piece in source.split(",") if piece.strip()] or [source]
    matches = [None if _path(piece).exists() else SHARE.fullmatch(piece) for piece in pieces]
    if not any(matches):
        return [(piece, 1.0) for piece in pieces]
    if not all(matches) or not all(float(match["share"]) > 0 for match in matches if match):
        raise CalibrationError(f"--calibration {source}: give every text a share above 0, as in a.jsonl:0.7,b.txt:0.3")
    return [(match["name"], float(match["share"])) for match in matches if match]


def text_names(source: str) -> list[str]:
    """The names of the texts of a source, without their shares."""
    matches = [(piece.strip(), SHARE.fullmatch(piece.strip())) for piece in source.split(",")]
    return [piece if match is None or "," not in source else match["name"] for piece, match in matches]


def without_folders(source: str) -> str:
    """The source with the names of local files alone: where they lie says something of their owner."""
    named = shares(source)
    names = [_path(name).name if _path(name).exists() else name for name, _ in named]
    if len(named) == 1:
        return names[0]
    return ",".join(f"{name}:{share:g}" for name, (_, share) in zip(names, named, strict=True))


def read_text(source: str, split: str, field: str | None = None, enough: int | None = None) -> Text:
    """A local file, a folder `path[:config[:split]]`, a Hub data set `owner/name[:config[:split]]`, or the demo's text.

    Raises CalibrationError if it cannot be used, HubError if the Hub cannot be reached.
    """
    if source == DEMO:
        return _demo(split)
    if not source.strip(" ,"):
        raise CalibrationError("the name of the text is empty; name a file, a folder, a Hub data set, or demo")
    path, config, named_split = _located(source)
    if path.is_dir():
        return read_folder(path, config, named_split or split, named_split is not None, field, enough)
    if path.exists():
        if config or named_split:
            raise CalibrationError(
                f"{source}: the file {path.name} has neither configurations nor splits; shares are numbers, of several "
                "texts (a.jsonl:0.7,b.txt:0.3)"
            )
        return read_file(path, field, enough)
    is_file = Path(source.partition(":")[0]).suffix.lower() in {".txt", ".raw", ".md", *ROWS, *COMPRESSIONS}
    if is_file or source.startswith((".", "/", "~")):
        siblings = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        siblings = [name for name in siblings if nearest(path.stem, [Path(name).stem])]  # the ending makes none similar
        raise CalibrationError(f"there is no text file {source}{nearest(path.name, siblings)}")
    name, _, _ = source.partition(":")
    return read_hub(name, config, named_split or split, field, enough)


def _located(source: str) -> tuple[Path, str | None, str | None]:
    """Path, configuration and split."""
    if (path := _path(source)).exists():
        return path, None, None
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    return _path(name), config or None, split or None


def _path(name: str) -> Path:
    return Path(name).expanduser()


def _demo(split: str) -> Text:
    from llmsqueeze.demo import stories

    if split == "test":
        return Text("the demo's story generator, evaluation seed", (stories.evaluation_text(),))
    return Text("the demo's story generator", (stories.calibration_text(),))
