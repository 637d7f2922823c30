"""What `--calibration` and `--text` name: a file, a folder, a data set on the Hub, the demo; or several with shares."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from llmsqueeze.errors import CalibrationError, nearest
from llmsqueeze.text.data_sets import read_hub
from llmsqueeze.text.document import Text
from llmsqueeze.text.files import COMPRESSIONS, PLAIN, ROWS, read_file
from llmsqueeze.text.folders import read_folder

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
    texts = [replace(read_text(name, "train", field, enough), share=share) for name, share in named]
    if field is not None and all(text.plain for text in texts):
        names = ", ".join(text.source for text in texts)
        raise CalibrationError(f"--text-field {field}: {names} is plain text, without fields; leave the option out")
    return texts


def evaluation_text(source: str | None, model: str, field: str | None = None) -> Text:
    """The text that `--text` names; if it names none, the demo's own for the demo, else WikiText-2 test."""
    if source is None:
        source = DEMO if model == DEMO else WIKITEXT
    return read_text(source, "test", field)


def shares(source: str) -> list[tuple[str, float]]:
    """The texts of a source and their shares: `a.jsonl:0.7,b.parquet:0.3`, or without shares if they are equal.

    Raises CalibrationError if some have a share and others none.
    """
    if _exists(source) or "," not in source:
        return [(source, 1.0)]
    pieces = pieces_of(source) or [source]
    matches = [None if _exists(piece) else SHARE.fullmatch(piece) for piece in pieces]
    if not any(matches):
        return [(piece, 1.0) for piece in pieces]
    if not all(matches) or not all(float(match["share"]) > 0 for match in matches if match):
        raise CalibrationError(f"--calibration {source}: give every text a share above 0, as in a.jsonl:0.7,b.txt:0.3")
    return [(match["name"], float(match["share"])) for match in matches if match]


def pieces_of(source: str) -> list[str]:
    """What commas separate. A comma in the name of a file that is there separates nothing."""
    words, pieces = source.split(","), list[str]()
    while words:
        joined = [",".join(words[:count]).strip() for count in range(1, len(words) + 1)]
        count = max((at for at, name in enumerate(joined, 1) if _names_file(name)), default=1)
        pieces, words = [*pieces, joined[count - 1]], words[count:]
    return [piece for piece in pieces if piece]


def _names_file(piece: str) -> bool:
    """Whether a file has this name, or this name without its share."""
    match = SHARE.fullmatch(piece)
    return bool(piece) and (_exists(piece) or (match is not None and _exists(match["name"])))


def text_names(source: str) -> list[str]:
    """The names of the texts of a source as `without_folders` writes it, without their shares."""
    several = re.fullmatch(r"(?:.+?:\d*\.?\d+(?:,|$))+", source) if "," in source else None
    return re.findall(r"(.+?):\d*\.?\d+(?:,|$)", source) if several else [source]


def without_folders(source: str) -> str:
    """The source with the names of local files alone: where they lie says something of their owner."""
    named = shares(source)
    names = [_path(name).name if _exists(name) else name for name, _ in named]
    if len(named) == 1:
        return names[0]
    return ",".join(f"{name}:{share:g}" for name, (_, share) in zip(names, named, strict=True))


def read_text(source: str, split: str, field: str | None = None, enough: int | None = None) -> Text:
    """A local file, a folder `path[:config[:split]]`, a Hub data set `owner/name[:config[:split]]`, or the demo's text.

    Raises CalibrationError if it cannot be used, HubError if the Hub cannot be reached.
    """
    if source == DEMO:
        return _demo(split)
    refuse_missing(source)
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
    name, _, _ = source.partition(":")
    return read_hub(name, config, named_split or split, field, enough)


def check_calibration(source: str | None) -> None:
    """Raises CalibrationError if `--calibration` names a local file that is not there: before anything is computed."""
    for name, _ in shares(source) if source is not None else ():
        if name not in (DEMO, SELF):
            refuse_missing(name)


def refuse_missing(source: str) -> None:
    """Raises CalibrationError for the name of a local file that is not there, and for an empty name."""
    if not source.strip(" ,"):
        raise CalibrationError("the name of the text is empty; name a file, a folder, a Hub data set, or demo")
    path, _, _ = _located(source)
    is_file = Path(source.partition(":")[0]).suffix.lower() in {*PLAIN, *ROWS, *COMPRESSIONS}
    if not path.exists() and (is_file or source.startswith((".", "/", "~"))):
        siblings = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        siblings = [name for name in siblings if nearest(path.stem, [Path(name).stem])]  # the ending makes none similar
        raise CalibrationError(f"there is no text file {source}{nearest(path.name, siblings)}")


def _located(source: str) -> tuple[Path, str | None, str | None]:
    """Path, configuration and split."""
    if _exists(source):
        return _path(source), None, None
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    return _path(name), config or None, split or None


def _path(name: str) -> Path:
    return Path(name).expanduser()


def _exists(name: str) -> bool:
    try:
        return _path(name).exists()
    except OSError:  # too long for a name of a file
        return False


def _demo(split: str) -> Text:
    from llmsqueeze.demo import stories

    if split == "test":
        return Text("the demo's story generator, evaluation seed", (stories.evaluation_text(),), plain=True)
    return Text("the demo's story generator", (stories.calibration_text(),), plain=True)
