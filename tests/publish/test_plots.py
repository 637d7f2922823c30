"""Plots: each cell and each point is in its place, and the files are sound and always the same."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from llmsqueeze.errors import OutputError
from llmsqueeze.publish.plots.cost import cost_curve
from llmsqueeze.publish.plots.figure import available, data_uri, render, write
from llmsqueeze.publish.plots.frontier import (
    LONGEST,
    MOST_NAMED,
    Point,
    frontier,
    frontier_text,
    original_nbytes,
    points_of,
)
from llmsqueeze.publish.plots.heat_map import BITS, ERRORS, MISSING, colour_range, heat_map, heat_map_text

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.collections import QuadMesh  # noqa: E402
from matplotlib.container import ErrorbarContainer  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

LLAMA = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"]
CURVE = [(1.5, 2.0), (2.0, 0.5), (3.0, 0.06), (4.0, 0.004)]


def make_blocks(count: int, kinds: Sequence[str] = LLAMA) -> list[list[str]]:
    return [[f"model.layers.{i}.{kind}" for kind in kinds] for i in range(count)]


def make_bits(blocks: list[list[str]]) -> dict[str, float]:
    """Bits that tell every linear from every other."""
    names = [name for block in blocks for name in block]
    return {name: 1 + 7 * i / len(names) for i, name in enumerate(names)}


def mesh_of(figure: Figure) -> QuadMesh:
    (mesh,) = [one for one in figure.axes[0].collections if isinstance(one, QuadMesh)]
    return mesh


def cells(figure: Figure) -> np.ma.MaskedArray:
    return np.ma.asarray(mesh_of(figure).get_array())


def kinds_of(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def numbers(axes: Axes) -> dict[tuple[float, float], str]:
    """The texts in the cells by (block, row)."""
    return {
        (x - 0.5, y - 0.5): t.get_text()
        for t in axes.texts
        for x, y in [t.get_position()]
        if "grey" not in t.get_text()
    }


def line(figure: Figure, label: str) -> Line2D:
    (drawn,) = [one for one in figure.axes[0].lines if str(one.get_label()).startswith(label)]
    return drawn


@pytest.mark.parametrize(("count", "numbered"), [(1, True), (3, True), (41, False)])
def test_a_cell_for_every_linear_with_its_number_if_it_can_be_read(count: int, numbered: bool) -> None:
    blocks = make_blocks(count)
    bits = make_bits(blocks)
    figure = heat_map(bits, blocks, "a plan")
    expected = [[bits[f"model.layers.{i}.{kind}"] for i in range(count)] for kind in LLAMA]
    assert kinds_of(figure) == LLAMA
    np.testing.assert_allclose(cells(figure), expected)
    assert not np.ma.getmaskarray(cells(figure)).any()
    assert figure.get_suptitle() == "a plan"
    assert "bits per weight" in figure.axes[1].get_ylabel()
    low, high = mesh_of(figure).get_clim()
    assert low <= min(bits.values())
    assert max(bits.values()) <= high
    every = {(x, y): f"{bits[name]:.2f}" for x, block in enumerate(blocks) for y, name in enumerate(block)}
    assert numbers(figure.axes[0]) == (every if numbered else {})


def test_the_first_row_is_on_top_and_the_blocks_are_numbered_from_zero() -> None:
    axes = heat_map(make_bits(make_blocks(3)), make_blocks(3), "t").axes[0]
    bottom, top = axes.get_ylim()
    assert bottom > top
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    many = heat_map(make_bits(make_blocks(126)), make_blocks(126), "t").axes[0]
    assert [label.get_text() for label in many.get_xticklabels()] == [str(i) for i in range(0, 126, 5)]
    assert list(many.get_xticks()) == [i + 0.5 for i in range(0, 126, 5)]


def test_missing_linears_are_grey() -> None:
    full = [*LLAMA[:2], "mlp.shared.up_proj", *LLAMA[2:]]
    blocks = [*make_blocks(1), [], [f"model.layers.2.{kind}" for kind in full], [f"model.layers.3.{LLAMA[2]}"]]
    bits = make_bits(blocks)
    del bits["model.layers.2.mlp.up_proj"]
    figure = heat_map(bits, blocks, "t")
    assert kinds_of(figure) == full  # a kind of a later block only has its place there
    missing = np.ma.getmaskarray(cells(figure))
    present = [[0, 2], [0, 2], [2], [0, 3], [0, 2]]
    assert [[i for i in range(4) if not row[i]] for row in missing] == present
    assert len(numbers(figure.axes[0])) == 9
    grey = matplotlib.colors.to_rgba(MISSING)
    assert mesh_of(figure).cmap.get_bad() == pytest.approx(grey)
    assert any("grey" in text.get_text() for text in figure.axes[0].texts)


@pytest.mark.parametrize(
    ("blocks", "kinds"),
    [
        ([["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"]], ["attn.c_attn", "mlp.c_fc"]),
        ([["model.layers.0.mixer.a"], ["model.layers.1.mlp.a"]], ["mixer.a", "mlp.a"]),
        ([["net.h0.x.up", "net.h0.y.up"], ["net.h1.x.up", "net.h1.y.up"]], ["x.up", "y.up"]),
        ([["linear"]], ["linear"]),
        ([["h.0"], ["h.1"]], ["0", "1"]),
    ],
    ids=["one block", "one linear each", "no numbers", "bare name", "blocks are linears"],
)
def test_rows_are_named_by_what_is_inside_a_block(blocks: list[list[str]], kinds: list[str]) -> None:
    assert kinds_of(heat_map({name: 3.0 for block in blocks for name in block}, blocks, "t")) == kinds


def test_every_number_contrasts_with_its_cell() -> None:
    blocks = make_blocks(8)
    figure = heat_map(make_bits(blocks), blocks, "t")
    colours = mesh_of(figure).to_rgba(cells(figure))[..., :3]
    light = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        cell, ink = light[int(y), int(x)] + 0.05, 1.05 if text.get_color() == "white" else 0.05
        assert max(cell, ink) / min(cell, ink) > 4.5  # WCAG 2, level AA


def test_a_nearly_uniform_plan_looks_uniform() -> None:
    blocks = make_blocks(2)
    figure = heat_map({name: 3.25 + 0.01 * i for i, name in enumerate(blocks[0] + blocks[1])}, blocks, "t")
    low, high = mesh_of(figure).get_clim()
    assert high - low == pytest.approx(BITS.least_span)
    assert low < 3.25 < 3.32 < high


def test_bits_that_are_unknown_or_wide() -> None:
    blocks = make_blocks(1)
    figure = heat_map(dict(zip(blocks[0], [math.nan, 16.0, 9.999, 0.0], strict=True)), blocks, "t")
    assert list(np.ma.getmaskarray(cells(figure))[:, 0]) == [True, False, False, False]
    assert numbers(figure.axes[0]) == {(0, 1): "16.0", (0, 2): "10.0", (0, 3): "0.00"}
    assert np.ma.getmaskarray(cells(heat_map({}, blocks, "t"))).all()


def test_errors_are_coloured_by_order_of_magnitude() -> None:
    blocks = make_blocks(1)
    percents = [0.0, 0.0004, 0.02, 30.0]
    figure = heat_map(dict(zip(blocks[0], percents, strict=True)), blocks, scale=ERRORS)
    assert list(numbers(figure.axes[0]).values()) == ["0", "<.001", "0.020", "30"]
    norm = mesh_of(figure).norm
    assert [norm(percent) for percent in (0.0, 0.0004, 30.0)] == [0, 0, 1]
    assert norm(0.02) == pytest.approx(math.log(0.02 / 0.0004) / math.log(30 / 0.0004))
    text = heat_map_text(dict(zip(blocks[0], percents, strict=True)), blocks, ERRORS)
    assert text == "4 linears in 1 blocks: from 0 (block 0, self_attn.q_proj) to 30 % error (block 0, mlp.down_proj)."
    assert colour_range([0.0, 0.0], ERRORS)(0.0) == 0


def test_the_curve_and_the_chosen_point() -> None:
    figure = cost_curve([*reversed(CURVE), (5.0, math.nan)], (2.7, 0.109), "cost")
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert "bits per weight" in axes.get_xlabel()
    assert "nats per token" in axes.get_ylabel()
    assert [tuple(point) for point in line(figure, "smallest").get_xydata()] == CURVE
    assert [tuple(point) for point in line(figure, "chosen").get_xydata()] == [(2.7, 0.109)]
    legend = axes.get_legend()
    assert legend is not None
    texts = " ".join(text.get_text() for text in legend.get_texts())
    assert "2.700 bits" in texts
    assert "+0.109 nats" in texts
    low, high = axes.get_ylim()
    assert low < 0.004 < 2.0 < high


def test_zeros_and_less_stand_on_the_edge_of_the_logarithmic_axis() -> None:
    figure = cost_curve([*CURVE, (5.0, 0.0), (6.0, -1e-5)], (5.0, 0.0), "t")
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    losses = np.asarray(line(figure, "smallest").get_ydata(), dtype=float)
    assert np.isnan(losses[4:]).all()
    assert not np.isnan(losses[:4]).any()
    edge = line(figure, "zero or less")
    assert list(edge.get_xdata()) == [5.0, 6.0]
    for mark in (edge, line(figure, "chosen")):
        assert set(mark.get_ydata()) == {0.0}
        assert mark.get_transform() == axes.get_xaxis_transform()
    low, high = axes.get_ylim()
    assert 0 < low < high


@pytest.mark.parametrize(
    ("curve", "chosen"),
    [
        ([(3.0, 0.0), (4.0, -0.1)], (3.0, 0.0)),
        ([(3.0, 0.1)], None),
        ([], (3.0, 0.1)),
        ([], None),
        (CURVE, (math.nan, math.inf)),
        ([(3.0, 1e-200), (4.0, 1e-210)], None),
    ],
    ids=["none positive", "one point", "chosen only", "nothing", "chosen not finite", "tiny"],
)
def test_odd_curves_are_drawn(curve: list[tuple[float, float]], chosen: tuple[float, float] | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = cost_curve(curve, chosen, "t")  # it is drawn, without a file
    positive = any(loss > 0 for _, loss in curve) or (chosen is not None and math.isfinite(chosen[0]))
    assert figure.axes[0].get_yscale() == ("log" if positive and chosen != (3.0, 0.0) else "linear")


def check_files(files: list[Path]) -> None:
    png, svg = files
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert png.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_files_are_sound_and_the_same_again(tmp_path: Path) -> None:
    blocks = make_blocks(2)
    figure = heat_map(make_bits(blocks), blocks, "t")
    files = write(figure, tmp_path / "a-2.7")
    assert files == [tmp_path / "a-2.7.png", tmp_path / "a-2.7.svg"]
    check_files(files)
    for again in (figure, heat_map(make_bits(blocks), blocks, "t")):
        assert files[1].read_bytes() == render(again, "svg")
    assert files[0].read_bytes() == render(figure, "png")
    assert b"<dc:date>" not in files[1].read_bytes()


def test_a_title_is_text_whatever_is_in_it() -> None:
    title = "$x_1 a_$ " + "very long name " * 10 + "模型"
    figure = cost_curve(CURVE, None, title)
    assert figure.get_suptitle().split() == title.split()
    assert "\n" in figure.get_suptitle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ElementTree.fromstring(render(figure, "svg")).tag.endswith("svg")


def test_the_users_settings_have_no_effect_and_do_not_change(tmp_path: Path) -> None:
    (plain,) = write(cost_curve(CURVE, None, "t"), tmp_path / "plain", ["svg"])
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "svg.fonttype": "none"}):
        before = dict(matplotlib.rcParams)
        (styled,) = write(cost_curve(CURVE, None, "t"), tmp_path / "styled", ["svg"])
        assert dict(matplotlib.rcParams) == before
    assert plain.read_bytes() == styled.read_bytes()


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write(cost_curve(CURVE, None, "t"), tmp_path / "none" / "cost")


def test_nothing_is_imported_before_it_is_necessary_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from llmsqueeze.publish.plots.figure import available, write\n"
        "from llmsqueeze.publish.plots.cost import cost_curve\n"
        "import llmsqueeze.publish.plots.draw\n"
        "assert available() and 'matplotlib' not in sys.modules\n"
        "write(cost_curve([(3.0, 0.1)], None, 't'), Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "cost")], check=True)
    write(cost_curve([(3.0, 0.1)], None, "t"), tmp_path / "here")
    for kind in ("png", "svg"):  # another process writes the same bytes
        assert (tmp_path / f"cost.{kind}").read_bytes() == (tmp_path / f"here.{kind}").read_bytes()


def test_without_matplotlib_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not available()


# quality against size


def make_points(losses: Sequence[float], **changes: Any) -> list[Point]:
    points = [Point(f"m{i}", 50e6 + 1e6 * i, loss, 0.01, i == 0, False) for i, loss in enumerate(losses)]
    return [dataclasses.replace(point, **changes) for point in points]


def bars(figure: Figure) -> list[tuple[float, float, float]]:
    """Bottom, centre and top of each error bar."""
    ends = []
    for container in figure.axes[0].containers:
        assert isinstance(container, ErrorbarContainer)
        data, _, (lines,) = container.lines
        assert data is not None
        (bar,) = lines.get_segments()
        ends.append((float(bar[0][1]), float(np.asarray(data.get_ydata())[0]), float(bar[1][1])))
    return ends


def test_points_lie_at_their_size_and_loss_with_error_bars() -> None:
    points = make_points([0.5, 0.02, 0.1])
    figure = frontier(points, 100e6, "t")
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_xscale() == "linear"
    assert bars(figure) == [pytest.approx((p.loss - 0.01, p.loss, p.loss + 0.01)) for p in points]
    assert list(line(figure, "size of the original").get_xdata()) == [100e6, 100e6]
    assert [text.get_text() for text in axes.texts] == ["m0", "m1", "m2"]


def test_the_frontier_is_a_line_through_its_models() -> None:
    points = [dataclasses.replace(p, on_frontier=i != 1) for i, p in enumerate(make_points([0.5, 0.7, 0.1]))]
    drawn = line(frontier(points, None, "t"), "frontier")
    assert [tuple(point) for point in drawn.get_xydata()] == [(50e6, 0.5), (52e6, 0.1)]


def test_losses_of_zero_or_less_are_on_the_edge_of_the_logarithmic_axis() -> None:
    figure = frontier(make_points([0.5, 0.0, -0.2, 0.02, 0.005]), None, "t")
    floor, _ = figure.axes[0].get_ylim()
    assert 0 < floor < 0.005
    assert [bar[1] for bar in bars(figure)] == pytest.approx([0.5, floor, floor, 0.02, 0.005])
    # only a bar that reaches zero ends on the edge
    assert [bar[0] == pytest.approx(floor) for bar in bars(figure)] == [False, True, True, False, True]


def test_the_axes_fit_the_numbers() -> None:
    negative = frontier(make_points([-0.1, -0.2]), None, "t").axes[0]
    assert negative.get_yscale() == "linear"
    wide = frontier(make_points([0.1, 0.1]), 4e9, "t").axes[0]
    assert wide.get_xscale() == "log"
    ticks = [label.get_text() for label in wide.get_xticklabels()]
    assert {"100 MB", "1 GB"} <= set(ticks)
    one = frontier(make_points([0.1], nbytes=5e5), None, "t").axes[0]
    assert all(re.fullmatch(r"[\d.]+ kB", label.get_text()) for label in one.get_xticklabels())


def test_names_cover_no_points_and_no_other_names() -> None:
    points = [Point(f"a-rather-long-name-{i}", 50e6 + 1e6 * i, 0.1 * 1.3**i, 0.0, False, False) for i in range(5)]
    figure = frontier(points, None, "t")
    axes = figure.axes[0]
    texts = [text.get_window_extent() for text in axes.texts]
    dots = [axes.transData.transform((point.nbytes, point.loss)) for point in points]
    assert not any(box.contains(*dot) for box in texts for dot in dots)
    assert not any(box.overlaps(other) for i, box in enumerate(texts) for other in texts[:i])
    edges = axes.get_window_extent()
    assert all(edges.x0 <= box.x0 and box.x1 <= edges.x1 for box in texts)


def test_of_many_models_only_the_frontier_and_this_one_are_named() -> None:
    points = make_points([0.1 * 1.1**i for i in range(MOST_NAMED + 1)])
    points[5] = dataclasses.replace(points[5], this=True)
    assert [text.get_text() for text in frontier(points, None, "t").axes[0].texts] == ["m0", "m5"]


def test_the_models_of_a_comparison() -> None:
    original = {"model": "owner/llama", "nbytes": 100, "nll_difference": 0.0}
    model = {"model": "runs/" + "x" * 40 + "-3bit/", "nbytes": 40, "nll_difference": 0.12, "on_frontier": True}
    hostile = [{"nbytes": "x"}, {"nbytes": -1, "nll_difference": 1.0}, {"nbytes": 5, "nll_difference": math.nan}]
    (point,) = points_of([original, model | {"nll_difference_stderr": 0.0123}, *hostile])
    assert len(point.name) <= LONGEST
    assert point.name.endswith("xx-3bit")
    assert (point.error, point.on_frontier, point.this) == (0.0123, True, False)
    assert frontier_text([point]) == f"{point.name}: 40 B, loss +0.120 ± 0.012 nats per token, on the frontier."
    assert original_nbytes([original]) == 100
    assert original_nbytes([{"nbytes": "x"}]) is None


def test_a_picture_in_a_page_is_an_svg_without_text_of_its_own() -> None:
    uri = data_uri(frontier(make_points([0.1], name="<script>$x_1 a_$ --> &"), None, ""))
    kind, _, content = uri.partition(",")
    assert kind == "data:image/svg+xml;base64"
    svg = base64.b64decode(content)
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert b"<script" not in svg
