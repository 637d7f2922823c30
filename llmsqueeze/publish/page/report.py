"""The page of `llmsqueeze report`: what a folder is, what it cost, where the bits and the errors are, how to make it.

Reads headers and records only, so it answers at once whatever the size of the model. The same folder gives the same
page.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from llmsqueeze.errors import OutputError
from llmsqueeze.files import whole_file
from llmsqueeze.publish.page import story, words
from llmsqueeze.publish.page.comparison import view_of
from llmsqueeze.publish.page.folder import Folder, Linear, read_folder
from llmsqueeze.publish.page.heat import NUMBERED, heat_map
from llmsqueeze.publish.page.render import render
from llmsqueeze.publish.page.scores import baseline, score_rows
from llmsqueeze.publish.page.words import number

REPORT = "report.html"
SHOWN = 50  # rows of the table of weights, until all are asked for
LEAST_SPAN = 1.0  # bits that the colours span at least, so that a nearly uniform plan looks like one


def write_report(folder: str | Path, out: Path | None = None) -> dict[str, Any]:
    """Writes the page, to `report.html` in the folder if nothing else is said; returns what to say of it.

    Raises CheckpointError or UnsupportedError for a folder that is not ours, OutputError if the page cannot be written.
    """
    read = read_folder(folder)
    out = out or Path(folder).expanduser() / REPORT
    if out.is_dir():
        raise OutputError(f"{out} is a folder; --out names a file, such as {out / REPORT}")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {out.absolute().parent} to write {out.name} to")
    html = report_page(read)
    with whole_file(out) as half:
        half.write_text(html, encoding="utf-8")
    return {
        "folder": str(folder),
        "out": str(out),
        "nbytes": out.stat().st_size,
        "linears": len(read.linears),
        "evaluated": bool(score_rows(read)),
        "compared": bool(read.comparison),
    }


def report_page(folder: Folder) -> str:
    """The HTML of a folder's report."""
    model = str(folder.record["model"])
    bits = {linear.name: linear.bits for linear in folder.linears if linear.bits is not None}
    errors = {linear.name: linear.error for linear in folder.linears if linear.error is not None}
    return render(
        "report.html",
        title=f"{folder.name}: {story.sentence(folder)}",
        folder=folder,
        sentence=story.sentence(folder),
        figures=story.figures(folder),
        how=story.how(folder),
        sizes=size_bars(folder),
        scores=score_rows(folder),
        evaluation=folder.evaluation,
        has_baseline=bool(baseline(folder)),
        measure=shlex.join(["llmsqueeze", "eval", folder.name, "--baseline", model]),
        compare=shlex.join(["llmsqueeze", "compare", model, folder.name, "OTHER-FOLDER"]),
        comparison=view_of(folder.comparison) if folder.comparison else None,
        bit_map=None if folder.dense else heat_map(bits, folder.blocks, words.fixed, "bits per weight", LEAST_SPAN),
        error_map=heat_map(errors, folder.blocks, cell_percent, "% error", log=True),
        rows=weight_rows(folder.linears),
        shown=SHOWN,
        recipe=story.recipe_yaml(folder.record),
        again=story.quantize_command(folder.record),
        own_text=story.own_text(folder.record),
        taught=[story.distill_command(about) for about in story.later_distillations(folder.record)],
    )


def cell_percent(share: float, decimals: int) -> str:
    """A share in percent, short enough for a cell with room for so many decimals."""
    if decimals == 1:
        return words.fixed(100 * share, 0 if share >= 0.0995 else 1)
    return "<0.001" if 0 < share < 1e-5 else words.percent(share).removesuffix(" %")


def size_bars(folder: Folder) -> list[dict[str, Any]]:
    """Original and result, in bytes and in shares of the larger; what the linears take of each where that is known."""
    before = number(folder.record["nbytes_original"]) or 0.0
    kept = None if folder.dense else folder.nbytes - folder.linear_nbytes
    largest = max(before, folder.nbytes, 1)
    return [
        {"name": name, "total": total, "share": total / largest}
        | {"linears": None if kept is None else max(total - kept, 0), "kept": kept}
        for name, total in (("Original", before), ("This model", float(folder.nbytes)))
    ]


def weight_rows(linears: list[Linear]) -> list[dict[str, Any]]:
    """The table of weights, largest error first; those without one come last."""
    ordered = sorted(linears, key=lambda linear: -1.0 if linear.error is None else linear.error, reverse=True)
    rows: list[dict[str, Any]] = []
    for linear in ordered:
        match = NUMBERED.match(linear.name)
        prefix = f"{match[1]}." if match else ""
        names = {"prefix": prefix, "rest": linear.name.removeprefix(prefix), "key": words.natural(linear.name)}
        rows.append({**names, "linear": linear})
    return rows
