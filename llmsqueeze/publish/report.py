"""`llmsqueeze report`: one HTML page about a folder. The same folder gives the same page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsqueeze.errors import OutputError
from llmsqueeze.files import REPORT, write_text
from llmsqueeze.publish import provenance
from llmsqueeze.publish.folder import Folder, mapping, read_public
from llmsqueeze.publish.linears import Linear
from llmsqueeze.publish.numbers import RANKINGS, ranked
from llmsqueeze.publish.page import story
from llmsqueeze.publish.page.comparison import view_of
from llmsqueeze.publish.page.pictures import NUMBERED, blocks_of, heat_map_picture, sizes_picture
from llmsqueeze.publish.page.render import render
from llmsqueeze.publish.page.times import time_rows
from llmsqueeze.publish.plots.figure import available
from llmsqueeze.publish.plots.heat_map import BITS, ERRORS
from llmsqueeze.publish.plots.sizes import Bar
from llmsqueeze.publish.scores import has_baseline, limited, reading, score_rows, with_text

SHOWN = 50  # rows of the table of weights, until the reader shows all


def write_report(folder: str | Path, out: Path | None = None) -> dict[str, Any]:
    """Writes the page to `out`, by default `report.html` in the folder; returns a summary.

    Raises UnsupportedError for a folder that is not ours, CheckpointError for a damaged one, OutputError if the page
    cannot be written.
    """
    path = Path(folder).expanduser()
    contents = read_public(path)
    out = out or path / REPORT
    if out.is_dir():
        raise OutputError(f"{out} is a folder; --out names a file, such as {out / REPORT}")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"there is no folder {out.absolute().parent} for {out.name}; name a folder that exists")
    html = report_page(contents)
    write_text(out, html)
    return {
        "folder": str(folder),
        "out": str(out),
        "nbytes": out.stat().st_size,
        "linears": len(contents.linears),
        "evaluated": bool(score_rows(contents.evaluation)),
        "compared": bool(contents.comparison),
    }


def report_page(folder: Folder) -> str:
    """The HTML of a folder's report."""
    model = str(folder.record["model"])
    bits = {linear.name: linear.bits for linear in folder.linears if linear.bits is not None}
    errors = {linear.name: 100 * linear.error for linear in folder.linears if linear.error is not None}
    blocks = blocks_of([linear.name for linear in folder.linears], folder.blocks)
    evaluation = with_text(folder.evaluation)
    scores = score_rows(folder.evaluation)
    return render(
        "report.html",
        unchanged=folder.unchanged,
        title=f"{folder.name}: {story.sentence(folder)}",
        folder=folder,
        sentence=story.sentence(folder),
        figures=story.figures(folder),
        history=story.history(folder),
        sizes=sizes_picture(size_bars(folder)),
        scores=scores,
        flips=any(row.flips for row in scores),
        evaluation=evaluation,
        reading=reading(evaluation),
        limited=bool(limited(folder.evaluation)),
        has_baseline=has_baseline(folder.evaluation),
        measure=shlex.join(["llmsqueeze", "eval", folder.name, "--baseline", model]),
        compare=shlex.join(["llmsqueeze", "compare", model, folder.name, "OTHER-FOLDER"]),
        comparison=view_of(folder.comparison) if folder.comparison else None,
        bit_map=None if folder.dense else heat_map_picture(bits, blocks, BITS),
        block_tables=[
            block_table(folder, blocks, ranking, scores)
            for ranking, scores in mapping(folder.record.get("block_scores")).items()
            if ranking in RANKINGS
        ],
        error_map=heat_map_picture(errors, blocks, ERRORS),
        times=time_rows(folder.record.get("time")),
        pictures=available(),
        rows=weight_rows(folder.linears),
        shown=SHOWN,
        recipe=provenance.recipe_yaml(folder.recipe),
        quantize=provenance.quantize_command(folder),
        own_text=provenance.own_text(folder),
        distill=[provenance.distill_command(one) for one in provenance.later_distillations(folder)],
    )


def size_bars(folder: Folder) -> list[Bar]:
    """The sizes of original and result; what is unchanged is known unless the result is dense."""
    kept = None if folder.dense else float(folder.nbytes - folder.linear_nbytes)
    before = folder.nbytes_original
    sizes = ([("Original", before)] if before else []) + [("This model", float(folder.nbytes))]
    return [Bar(name, nbytes, None if kept is None else min(kept, nbytes)) for name, nbytes in sizes]


def block_table(
    folder: Folder, blocks: Sequence[Sequence[str]], ranking: str, scores: Sequence[float]
) -> dict[str, Any]:
    """The score of every block and the bits per weight of its linears, the most important first."""
    by_name = {linear.name: linear for linear in folder.linears}
    rows = []
    for block in ranked(ranking, scores):
        linears = [by_name[name] for name in (blocks[block] if block < len(blocks) else ()) if name in by_name]
        weights = sum(linear.weights or 0 for linear in linears)
        bits = 8 * sum(linear.nbytes or 0 for linear in linears) / weights if weights and not folder.dense else None
        rows.append((block, scores[block], bits))
    return {"name": RANKINGS[ranking].name, "rows": rows}


def weight_rows(linears: Sequence[Linear]) -> list[dict[str, Any]]:
    """The table of weights, largest error first, then the weights without an error."""
    ordered = sorted(linears, key=lambda linear: -1.0 if linear.error is None else linear.error, reverse=True)
    rows: list[dict[str, Any]] = []
    for linear in ordered:
        match = NUMBERED.match(linear.name)
        prefix = f"{match[1]}." if match else ""
        names = {"prefix": prefix, "rest": linear.name.removeprefix(prefix), "key": natural(linear.name)}
        rows.append({**names, "linear": linear})
    return rows


def natural(name: str) -> str:
    """A key that sorts layers.2 before layers.10."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(6), name)
