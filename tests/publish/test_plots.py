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
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from llmsqueeze.errors import OutputError
from llmsqueeze.publish.plots.cost import cost_curve
from llmsqueeze.publish.plots.draw import quality
from llmsqueeze.publish.plots.figure import available, data_uri, render, write
from llmsqueeze.publish.plots.frontier import MOST_NAMED, frontier
from llmsqueeze.publish.plots.heat_map import BITS, ERRORS, MISSING, PAGE, Scale, colour_range, heat_map, heat_map_text
from llmsqueeze.publish.plots.labels import cross, crosses, place_labels
from llmsqueeze.publish.plots.points import Point, about_equal, in_words, original_nbytes, points_of
from llmsqueeze.publish.plots.sizes import Bar, size_bars, sizes_text

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.collections import QuadMesh  # noqa: E402
from matplotlib.container import ErrorbarContainer  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.text import Text  # noqa: E402

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


def key_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


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
    """One colour to the eye, and the number is told once."""
    blocks = make_blocks(30)
    names = [name for block in blocks for name in block]
    figure = heat_map({name: 4.25 + 0.001 * (i % 2) for i, name in enumerate(names)}, blocks, "t")
    low, high = mesh_of(figure).get_clim()
    assert high - low == pytest.approx(BITS.least_span)
    assert low < 4.25 < 4.251 < high
    colours = mesh_of(figure).to_rgba(cells(figure))
    assert np.ptp(colours.reshape(-1, 4), axis=0).max() < 0.01
    assert {text.get_text() for text in figure.axes[0].texts} == {"all 4.25"}
    assert heat_map_text(dict.fromkeys(names, 4.25), blocks) == "120 linears in 30 blocks: all 4.25 bits per weight."


def test_nearly_equal_errors_look_equal() -> None:
    norm = colour_range([1.0, 1.02], ERRORS)
    assert norm(1.02) - norm(1.0) < 0.01
    assert norm.vmax / norm.vmin == pytest.approx(ERRORS.least_span)


def test_only_cells_that_tell_something_have_a_number() -> None:
    """A row says once what most of its cells say."""
    blocks = make_blocks(30)
    widths = dict(zip(LLAMA, (2.13, 2.25, 3.0, 4.0), strict=True))
    bits = {f"model.layers.{i}.{kind}": bits for i in range(30) for kind, bits in widths.items()}
    figure = heat_map(bits | {"model.layers.7.mlp.up_proj": 4.13}, blocks, "t")
    said = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert said == {
        "4.13": (7.5, 2.5),
        "all 2.13": (30.2, 0.5),
        "all 2.25": (30.2, 1.5),
        "else 3.00": (30.2, 2.5),
        "all 4.00": (30.2, 3.5),
    }
    bar = figure.axes[1].get_window_extent()
    assert not any(text.get_window_extent().overlaps(bar) for text in figure.axes[0].texts)
    many = make_blocks(80)
    notes = [text.get_text() for text in heat_map(make_bits(many) | bits, many, "t").axes[0].texts]
    assert notes == [], "where no cell has room for a number only what all say is told"
    notes = [t.get_text() for t in heat_map({name: 2.13 for block in many for name in block}, many, "t").axes[0].texts]
    assert notes == ["all 2.13"] * 4


@pytest.mark.parametrize("count", [3, 24, 30, 40])
@pytest.mark.parametrize("scale", [BITS, ERRORS], ids=["bits", "errors"])
def test_numbers_stay_in_their_cells_and_the_map_on_a_page(count: int, scale: Scale) -> None:
    blocks = make_blocks(count)
    figure = heat_map(make_bits(blocks), blocks, scale=scale)
    axes = figure.axes[0]
    (left, _), (right, _) = axes.transData.transform([(0, 0), (1, 0)])
    assert all(text.get_window_extent().width < right - left for text in axes.texts)
    assert figure.get_figwidth() <= PAGE + (0 if count <= 30 else 2)


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
    assert list(numbers(figure.axes[0]).values()) == ["0", "≈0", ".02", "30"]
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
    texts = " ".join(key_of(figure))
    assert "2.700 bits" in texts
    assert "+0.109 nats" in texts
    assert not figure.legends[0].get_window_extent().overlaps(axes.get_window_extent()), "it covers no line"
    assert all(axes.get_xlim()[0] <= tick <= axes.get_xlim()[1] for tick in ticks_of(axes.xaxis))
    assert all(axes.get_ylim()[0] <= tick <= axes.get_ylim()[1] for tick in ticks_of(axes.yaxis))
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
    points = [Point(i + 2, f"m{i}", 50e6 + 1e6 * i, loss, 0.01, i == 0, False) for i, loss in enumerate(losses)]
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
    assert axes.get_xlabel() == "size of all weights (the original: 100 MB)"
    assert [text.get_text() for text in axes.texts] == ["2", "3", "4"]
    assert key_of(figure) == ["frontier", "2  m0", "3  m1", "4  m2"]


def test_the_frontier_is_a_line_through_its_models() -> None:
    points = [dataclasses.replace(p, on_frontier=i != 1) for i, p in enumerate(make_points([0.5, 0.7, 0.1]))]
    figure = frontier(points, None, "t")
    (drawn,) = [one for one in figure.axes[0].lines if len(one.get_xydata()) == 2]
    assert [tuple(point) for point in drawn.get_xydata()] == [(50e6, 0.5), (52e6, 0.1)]


def test_losses_of_zero_or_less_are_on_the_edge_of_the_logarithmic_axis() -> None:
    figure = frontier(make_points([0.5, 0.0, -0.002, 0.02, 0.005]), None, "t")
    floor, _ = figure.axes[0].get_ylim()
    assert 0 < floor < 0.005
    assert [bar[1] for bar in bars(figure)] == pytest.approx([0.5, floor, floor, 0.02, 0.005])
    # only a bar that reaches zero ends on the edge
    assert [bar[0] == pytest.approx(floor) for bar in bars(figure)] == [False, True, True, False, True]


def ticks_of(axis: Any) -> list[float]:
    return [float(tick) for tick in axis.get_majorticklocs()]


EQUAL = [0.0500 + 0.0004 * i for i in range(MOST_NAMED)]  # losses of models that are hard to tell apart


@pytest.mark.parametrize(
    "points",
    [
        make_points([0.1], nbytes=5e5),
        make_points([0.1, 0.1], nbytes=45_007_331),
        make_points(EQUAL, nbytes=45_007_331, on_frontier=True),
        [dataclasses.replace(p, nbytes=45e6 + 1e4 * i) for i, p in enumerate(make_points([0.5, 0.02, 0.1]))],
        make_points([0.5, 0.02, 0.1]),
        [dataclasses.replace(p, nbytes=4e7 * 3**i) for i, p in enumerate(make_points([0.5, 0.2, 0.1]))],
        make_points([-0.1, -0.2]),
        make_points([0.002, -0.008, -0.002]),
        make_points([0.0, 0.0], error=0.0),
    ],
    ids=["one", "equal", "twelve equal", "about equal", "near", "far", "negative", "both", "zero"],
)
def test_points_stand_within_the_axes_and_ticks_too(points: list[Point]) -> None:
    axes = frontier(points, 269e6, "t").axes[0]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    across = axes.transAxes.inverted().transform(axes.transData.transform([(p.nbytes, 0.1) for p in points]))[:, 0]
    assert across.min() > 0.05
    assert across.max() < 0.95
    if len({p.nbytes for p in points}) == 1:
        assert across == pytest.approx(0.5)
    sizes, losses = ticks_of(axes.xaxis), ticks_of(axes.yaxis)
    assert all(left <= tick <= right for tick in sizes)
    assert all(bottom <= tick <= top for tick in losses)
    assert min(len(sizes), len(losses)) >= 2
    texts = [label.get_text() for label in axes.get_xticklabels()]
    assert len({*texts}) == len(texts), "no two ticks have the same label"


def test_the_axes_fit_the_numbers() -> None:
    for losses in ([-0.1, -0.2], [0.002, -0.008], [0.0, 0.0]):
        linear = frontier(make_points(losses), None, "t").axes[0]
        assert linear.get_yscale() == "linear"
        assert all(linear.get_ylim()[0] < loss < linear.get_ylim()[1] for loss in losses)
    wide = frontier([*make_points([0.1]), *make_points([0.1], nbytes=4e9)], None, "t").axes[0]
    assert wide.get_xscale() == "log"
    ticks = [label.get_text() for label in wide.get_xticklabels()]
    assert {"100 MB", "1 GB"} <= set(ticks)
    one = frontier(make_points([0.1], nbytes=5e5), None, "t").axes[0]
    assert all(re.fullmatch(r"[\d.]+ kB", label.get_text()) for label in one.get_xticklabels())


@pytest.mark.parametrize(
    "points",
    [
        [Point(i + 2, f"name-{i}", 50e6 + 1e6 * i, 0.1 * 0.8**i, 0.01, True, False) for i in range(5)],
        make_points([0.05] * 6, nbytes=45e6),
        make_points([0.002, -0.008, -0.002, 0.0]),
        [
            dataclasses.replace(p, nbytes=45e6 + 1e6 * (i % 4), on_frontier=i < 4)
            for i, p in enumerate(make_points(EQUAL))
        ],
    ],
    ids=["a falling line", "the same point", "around zero", "equal sizes in groups"],
)
def test_numbers_cover_no_points_no_lines_and_no_other_numbers(points: list[Point]) -> None:
    figure = frontier(points, None, "t")
    axes = figure.axes[0]
    assert {text.get_text() for text in axes.texts} == {str(point.place) for point in points}
    figure.draw_without_rendering()
    texts = [Text.get_window_extent(text) for text in axes.texts]
    dots = [axes.transData.transform((point.nbytes, point.loss)) for point in points]
    assert not any(box.contains(*dot) for box in texts for dot in dots)
    assert not any(box.overlaps(other) for i, box in enumerate(texts) for other in texts[:i])
    edges = axes.get_window_extent()
    assert all(edges.x0 <= box.x0 and box.x1 <= edges.x1 for box in texts)
    lines = [axes.transData.transform(ends) for ends in drawn_lines(axes)]
    lines += [np.asarray(text.arrow_patch.get_path().vertices) for text in axes.texts if text.arrow_patch]
    along = np.linspace(0, 1, 300)[:, None]
    walked = [(1 - along) * start + along * end for start, end in lines]
    assert not any(box.contains(*place) for box in texts for walk in walked for place in walk)
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(edges)


def drawn_lines(axes: Axes) -> list[Any]:
    """The error bars, and the frontier piece by piece, as pairs of points."""
    bars = [segment for lines in axes.collections for segment in lines.get_segments()]
    best = max((np.asarray(one.get_xydata()) for one in axes.lines), key=len)
    zero = [[(axes.get_xlim()[0], 0.0), (axes.get_xlim()[1], 0.0)]] if axes.get_yscale() == "linear" else []
    return [*bars, *zero, *(pairwise(best) if len(best) > 2 else ())]


@pytest.mark.parametrize("losses", [EQUAL, [0.5, 0.02, 0.1], [0.1], [0.0, 0.0], [-0.2, 0.01]])
def test_models_of_one_size_stand_in_order_with_their_names(losses: list[float]) -> None:
    points = make_points(losses, nbytes=45_007_331, name="layerwise, 2.6 bits: runs/" + "x" * 60 + "/out-6")
    figure = quality(points, 269e6, "t")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "loss increase (nats per token), at 45.0 MB (the original: 269 MB)"
    ordered = sorted(points, key=lambda point: point.loss)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert [name.split()[0] for name in names] == [str(point.place) for point in ordered]
    assert all(name.split()[1:3] == ["layerwise,", "2.6"] and name.endswith("x/out-6") for name in names)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(one.y0 >= other.y1 and one.x0 > 0 for one, other in pairwise(boxes))
    left, right = axes.get_xlim()
    assert all(left < point.loss - point.error and point.loss + point.error < right for point in points)
    assert all(left <= tick <= right for tick in ticks_of(axes.xaxis))
    assert len(ticks_of(axes.xaxis)) >= 2
    top, bottom = (axes.transData.transform((left, row))[1] for row in (0, len(points) - 1))
    assert top >= bottom, "the best on top"


def test_sizes_that_differ_are_drawn_by_size() -> None:
    near, far = make_points([0.5, 0.02], nbytes=45e6), make_points([0.1], nbytes=47e6)
    assert [len(group) for group in about_equal([*far, *near])] == [2, 1]
    assert quality([*near, *far], None, "t").axes[0].get_xlabel() == "size of all weights"


def test_whether_a_segment_crosses_a_box_or_another_segment() -> None:
    """By many points on it."""
    random = np.random.default_rng(0)
    for _ in range(300):
        ends, (left, bottom) = random.uniform(0, 10, (2, 2)), random.uniform(0, 8, 2)
        box = (left, bottom, left + 2, bottom + 1)
        on = ends[0] + np.linspace(0, 1, 20_001)[:, None] * (ends[1] - ends[0])
        inside = (box[0] < on[:, 0]) & (on[:, 0] < box[2]) & (box[1] < on[:, 1]) & (on[:, 1] < box[3])
        segment = (tuple(ends[0]), tuple(ends[1]))
        assert crosses(segment, box) == inside.any()
        other = random.uniform(0, 10, (2, 2))
        share = np.linalg.solve(np.stack([ends[1] - ends[0], other[0] - other[1]], 1), other[0] - ends[0])
        assert cross(segment, (tuple(other[0]), tuple(other[1]))) == bool(((share > 0) & (share < 1)).all())
    assert crosses(((0, 1), (9, 1)), (2, 0, 3, 2))
    assert not crosses(((0, 3), (9, 3)), (2, 0, 3, 2))


def test_a_label_without_a_free_place_is_left_out() -> None:
    everywhere = [(-100.0, -100.0, 100.0, 100.0)]
    assert place_labels([(0, 0)], [(6, 9)], everywhere, [], (-100, -100, 100, 100)) == [None]


def test_of_many_models_only_the_frontier_and_this_one_are_named() -> None:
    points = make_points([0.1 * 1.1**i for i in range(MOST_NAMED + 1)])
    points[5] = dataclasses.replace(points[5], this=True)
    figure = frontier(points, None, "t")
    assert [text.get_text() for text in figure.axes[0].texts] == ["2", "7"]
    assert key_of(figure) == ["frontier", "2  m0", "7  m5 (this folder)"]


def test_the_models_of_a_comparison() -> None:
    original = {"model": "owner/llama", "nbytes": 100, "nll_difference": 0.0}
    model = {"model": "runs/6/", "method": "gptq", "bits": 3.0, "nbytes": 40, "nll_difference": 0.12}
    model |= {"on_frontier": True}
    hostile = [{"nbytes": "x"}, {"nbytes": -1, "nll_difference": 1.0}, {"nbytes": 5, "nll_difference": math.nan}]
    (point,) = points_of([original, model | {"nll_difference_stderr": 0.0123}, *hostile])
    assert (point.place, point.name) == (2, "gptq, 3 bits: runs/6")
    assert (point.error, point.on_frontier, point.this) == (0.0123, True, False)
    assert in_words([point]) == f"{point.name}: 40 B, loss +0.120 ± 0.012 nats per token, on the frontier."
    assert original_nbytes([original]) == 100
    assert original_nbytes([{"nbytes": "x"}]) is None


def test_a_picture_in_a_page_is_an_svg_without_text_of_its_own() -> None:
    uri = data_uri(frontier(make_points([0.1], name="<script>$x_1 a_$ --> &"), None, ""))
    kind, _, content = uri.partition(",")
    assert kind == "data:image/svg+xml;base64"
    svg = base64.b64decode(content)
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert b"<script" not in svg


def test_the_bars_of_a_report_are_as_long_as_the_bytes() -> None:
    bars = [Bar("Original", 100e6, 30e6), Bar("This model", 45e6, 30e6)]
    axes = size_bars(bars).axes[0]
    spans = [(float(one.get_x()), float(one.get_width())) for one in axes.patches]  # type: ignore[attr-defined]
    assert spans == [(0, 70e6), (70e6, 30e6), (0, 15e6), (15e6, 30e6)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Original\n100 MB", "This model\n45.0 MB"]
    assert sizes_text(bars[1:]) == "This model: 45.0 MB, of which 15.0 MB compressed linears and 30.0 MB unchanged."
    assert sizes_text([Bar("This model", 45e6, None)]) == "This model: 45.0 MB."
