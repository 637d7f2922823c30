"""Pictures: every cell and point is where it belongs, and the files are sound and always the same."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from llmsqueeze.errors import OutputError
from llmsqueeze.publish import plots

matplotlib = pytest.importorskip("matplotlib")
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.collections import QuadMesh  # noqa: E402
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
    (found,) = [one for one in figure.axes[0].lines if str(one.get_label()).startswith(label)]
    return found


@pytest.mark.parametrize("count", [1, 2, 6, 40, 41, 126])
def test_a_cell_for_every_linear(count: int) -> None:
    blocks = make_blocks(count)
    bits = make_bits(blocks)
    figure = plots.heat_map(bits, blocks, "a plan")
    expected = [[bits[f"model.layers.{i}.{kind}"] for i in range(count)] for kind in LLAMA]
    assert kinds_of(figure) == LLAMA
    np.testing.assert_allclose(cells(figure), expected)
    assert not np.ma.getmaskarray(cells(figure)).any()
    assert figure.get_suptitle() == "a plan"
    assert "bits per weight" in figure.axes[1].get_ylabel()
    low, high = mesh_of(figure).get_clim()
    assert low <= min(bits.values())
    assert max(bits.values()) <= high


@pytest.mark.parametrize(("count", "numbered"), [(1, True), (40, True), (41, False), (126, False)])
def test_numbers_stand_in_their_cells_while_they_can_be_read(count: int, numbered: bool) -> None:
    blocks = make_blocks(count)
    bits = make_bits(blocks)
    found = numbers(plots.heat_map(bits, blocks, "t").axes[0])
    every = {(x, y): f"{bits[name]:.2f}" for x, block in enumerate(blocks) for y, name in enumerate(block)}
    assert found == (every if numbered else {})


def test_the_first_row_is_on_top_and_the_blocks_are_numbered_from_zero() -> None:
    axes = plots.heat_map(make_bits(make_blocks(3)), make_blocks(3), "t").axes[0]
    bottom, top = axes.get_ylim()
    assert bottom > top
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    many = plots.heat_map(make_bits(make_blocks(126)), make_blocks(126), "t").axes[0]
    assert [label.get_text() for label in many.get_xticklabels()] == [str(i) for i in range(0, 126, 5)]
    assert list(many.get_xticks()) == [i + 0.5 for i in range(0, 126, 5)]


def test_blocks_that_differ_and_linears_left_out_are_grey() -> None:
    full = [*LLAMA[:2], "mlp.shared.up_proj", *LLAMA[2:]]
    blocks = [*make_blocks(1), [], [f"model.layers.2.{kind}" for kind in full], [f"model.layers.3.{LLAMA[2]}"]]
    bits = make_bits(blocks)
    del bits["model.layers.2.mlp.up_proj"]
    figure = plots.heat_map(bits, blocks, "t")
    assert kinds_of(figure) == full  # what only a later block has stands where it stands there
    missing = np.ma.getmaskarray(cells(figure))
    present = [[0, 2], [0, 2], [2], [0, 3], [0, 2]]
    assert [[i for i in range(4) if not row[i]] for row in missing] == present
    assert len(numbers(figure.axes[0])) == 9
    grey = matplotlib.colors.to_rgba(plots.MISSING)
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
    assert kinds_of(plots.heat_map({name: 3.0 for block in blocks for name in block}, blocks, "t")) == kinds


def test_every_number_contrasts_with_its_cell() -> None:
    blocks = make_blocks(40)
    figure = plots.heat_map(make_bits(blocks), blocks, "t")
    colours = mesh_of(figure).to_rgba(cells(figure))[..., :3]
    light = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        cell, ink = light[int(y), int(x)] + 0.05, 1.05 if text.get_color() == "white" else 0.05
        assert max(cell, ink) / min(cell, ink) > 4.5  # WCAG 2, level AA


def test_a_nearly_uniform_plan_looks_uniform() -> None:
    blocks = make_blocks(2)
    figure = plots.heat_map({name: 3.25 + 0.01 * i for i, name in enumerate(blocks[0] + blocks[1])}, blocks, "t")
    low, high = mesh_of(figure).get_clim()
    assert high - low == pytest.approx(plots.LEAST_SPAN)
    assert low < 3.25 < 3.32 < high


def test_bits_that_are_none_or_wide() -> None:
    blocks = make_blocks(1)
    figure = plots.heat_map(dict(zip(blocks[0], [math.nan, 16.0, 9.999, 0.0], strict=True)), blocks, "t")
    assert list(np.ma.getmaskarray(cells(figure))[:, 0]) == [True, False, False, False]
    assert numbers(figure.axes[0]) == {(0, 1): "16.0", (0, 2): "10.0", (0, 3): "0.00"}
    assert np.ma.getmaskarray(cells(plots.heat_map({}, blocks, "t"))).all()


def test_the_curve_and_the_chosen_point() -> None:
    figure = plots.cost_curve([*reversed(CURVE), (5.0, math.nan)], (2.7, 0.109), "cost")
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert "bits per weight" in axes.get_xlabel()
    assert "nats per token" in axes.get_ylabel()
    assert [tuple(point) for point in line(figure, "smallest").get_xydata()] == CURVE
    assert [tuple(point) for point in line(figure, "chosen").get_xydata()] == [(2.7, 0.109)]
    legend = axes.get_legend()
    assert legend is not None
    shown = " ".join(text.get_text() for text in legend.get_texts())
    assert "2.700 bits" in shown
    assert "+0.109 nats" in shown
    low, high = axes.get_ylim()
    assert low < 0.004 < 2.0 < high


def test_zeros_and_less_stand_on_the_edge_of_the_logarithmic_axis() -> None:
    figure = plots.cost_curve([*CURVE, (5.0, 0.0), (6.0, -1e-5)], (5.0, 0.0), "t")
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
def test_odd_curves_are_drawn(
    curve: list[tuple[float, float]], chosen: tuple[float, float] | None, tmp_path: Path
) -> None:
    figure = plots.cost_curve(curve, chosen, "t")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_files(plots.write(figure, tmp_path / "cost"))
    positive = any(loss > 0 for _, loss in curve) or (chosen is not None and math.isfinite(chosen[0]))
    assert figure.axes[0].get_yscale() == ("log" if positive and chosen != (3.0, 0.0) else "linear")


def check_files(files: list[Path]) -> None:
    png, svg = files
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert png.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("count", [1, 3, 126])
def test_files_are_sound_and_the_same_again(count: int, tmp_path: Path) -> None:
    blocks = make_blocks(count)
    bits = make_bits(blocks)
    for name in ("a-2.7", "b-2.7"):
        figure = plots.heat_map(bits, blocks, "t")
        files = plots.write(figure, tmp_path / name)
        assert files == [tmp_path / f"{name}.png", tmp_path / f"{name}.svg"]
        check_files(files)
    plots.write(figure, tmp_path / "again")
    for kind in ("png", "svg"):
        first = (tmp_path / f"a-2.7.{kind}").read_bytes()
        assert first == (tmp_path / f"b-2.7.{kind}").read_bytes()
        assert first == (tmp_path / f"again.{kind}").read_bytes()
        assert b"<dc:date>" not in first


def test_a_title_is_text_whatever_is_in_it(tmp_path: Path) -> None:
    title = "$x_1 a_$ " + "very long name " * 10 + "模型"
    figure = plots.cost_curve(CURVE, None, title)
    assert figure.get_suptitle().split() == title.split()
    assert "\n" in figure.get_suptitle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_files(plots.write(figure, tmp_path / "t"))


def test_the_users_settings_neither_matter_nor_change(tmp_path: Path) -> None:
    blocks = make_blocks(2)
    plots.write(plots.heat_map(make_bits(blocks), blocks, "t"), tmp_path / "plain")
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "svg.fonttype": "none"}):
        before = dict(matplotlib.rcParams)
        plots.write(plots.heat_map(make_bits(blocks), blocks, "t"), tmp_path / "styled")
        assert dict(matplotlib.rcParams) == before
    for kind in ("png", "svg"):
        assert (tmp_path / f"plain.{kind}").read_bytes() == (tmp_path / f"styled.{kind}").read_bytes()


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write the picture"):
        plots.write(plots.cost_curve(CURVE, None, "t"), tmp_path / "none" / "cost")


def test_nothing_is_imported_before_it_is_needed_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmsqueeze.publish import plots; assert plots.available()\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.write(plots.heat_map({'h.0.a': 3.0}, [['h.0.a']], 't'), Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "plan")], check=True)
    plots.write(plots.heat_map({"h.0.a": 3.0}, [["h.0.a"]], "t"), tmp_path / "here")
    for kind in ("png", "svg"):  # another process writes the same bytes
        assert (tmp_path / f"plan.{kind}").read_bytes() == (tmp_path / f"here.{kind}").read_bytes()


def test_without_matplotlib_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plots.available()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not plots.available()
