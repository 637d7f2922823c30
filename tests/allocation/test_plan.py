"""Plans and profiles: measured once, written, edited, refused where they do not fit, and followed to the byte."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmsqueeze.compress import blocks, reuse, search
from llmsqueeze.compress import plan as planning
from llmsqueeze.compress.plan import plan
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.compress.search import WIDTH, Round, bisect
from llmsqueeze.errors import BudgetError, CheckpointError, RecipeError
from llmsqueeze.measure.profile import load
from llmsqueeze.model.checkpoint import Checkpoint, file_digests, open_checkpoint, weights_digest
from llmsqueeze.model.original import Source
from llmsqueeze.publish.show import contents
from llmsqueeze.recipe.recipe import Recipe

FAST = {"samples": 6, "seq_len": 48, "widths": [1, 2, 3, 4]}
DEMO = Source("demo")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's plan at 2.5 bits and its profile."""
    folder = tmp_path_factory.mktemp("plan") / "demo-plan"
    plan(DEMO, {"bits": 2.5, **FAST}, folder, trial=False)
    return folder


@pytest.fixture
def own(planned: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    shutil.copytree(planned, tmp_path / "plan")
    return tmp_path / "plan"


def edit(folder: Path, **changes: Any) -> Path:
    """The plan file with some linears changed; None leaves one out."""
    file = folder / "plan.yaml"
    content = yaml.safe_load(file.read_text())
    for name, entry in changes.items():
        if entry is None:
            del content["weights"][name]
        else:
            content["weights"][name] = entry
    file.write_text(yaml.safe_dump(content))
    return file


def shards(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize("settings", [{"bits": 2.5}, {"bits": 3.2, "granularity": "linear"}, {"size": "500kB"}])
def test_the_budget_is_kept_and_used(settings: dict[str, Any], planned: Path, tmp_path: Path) -> None:
    shutil.copy(planned / "profile.safetensors", tmp_path)
    result = plan(DEMO, settings | FAST, tmp_path, trial=False)
    if "bits" in settings:
        spent, allowed = result["bits_per_weight"], settings["bits"]
    else:
        spent, allowed = result["nbytes"], 500_000
    smallest_step = 0.05 if "granularity" in settings else 0.01
    assert (1 - smallest_step) * allowed <= spent <= allowed


def test_a_second_plan_reads_no_weight(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read_raw", refuse)
    monkeypatch.setattr(reuse, "measure", refuse)
    result = plan(DEMO, {"bits": 3.5, **FAST}, own, trial=False)
    assert 3.4 < result["bits_per_weight"] <= 3.5


@pytest.mark.parametrize(
    ("settings", "reason"), [({"seed": 1}, "calibration"), ({"group_size": 32}, "no costs for 1 bit g32")]
)
def test_a_profile_that_does_not_serve_is_measured_anew(settings: dict[str, Any], reason: str, own: Path) -> None:
    from llmsqueeze.progress import Progress

    notes: list[str] = []

    class Listening(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    plan(DEMO, {"bits": 2.5, **FAST} | settings, own, trial=False, progress=Listening())
    assert reason in notes[0]
    assert "measured again" in notes[0]


def test_a_plan_followed_gives_what_the_command_gives(planned: Path, tmp_path: Path) -> None:
    """One command, or plan and then quantize: the same bytes; and the plan foretold how many."""
    quantize(DEMO, {"bits": 2.5, **FAST}, tmp_path / "direct")
    summary = quantize(DEMO, {}, tmp_path / "followed", plan=planned)
    assert shards(tmp_path / "direct") == shards(tmp_path / "followed")
    foretold = yaml.safe_load((planned / "plan.yaml").read_text())
    assert foretold["nbytes"] == summary["nbytes"] == open_checkpoint(tmp_path / "followed").nbytes
    assert foretold["bits_per_weight"] == summary["bits_per_weight"] <= 2.5
    assert summary["predicted_loss_increase"] == pytest.approx(foretold["predicted_loss_increase"])


def test_an_edited_plan_is_followed(own: Path, demo_dir: Path, tmp_path: Path) -> None:
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    file = edit(own, **{up: "8 bit g32", down: None})
    quantize(DEMO, {}, tmp_path / "out", plan=file)
    held = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["weights"]
    assert [(s["bits"], s["group_size"]) for s in held[up]["parts"]] == [(8, 32)]
    assert down not in held
    stored, original = open_checkpoint(tmp_path / "out"), open_checkpoint(demo_dir)
    assert torch.equal(stored.read(f"{down}.weight"), original.read(f"{down}.weight"))


GROUPS = {"granularity": "group", "levels": "integer", "quantizer": "rtn", "samples": 2, "seq_len": 32}


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"bits": 3.3}, "compressed-tensors"),
        ({"bits": 3.3, "portable": False}, "llmsqueeze"),
        ({"bits": 3.6, "symmetric": False}, "llmsqueeze"),
    ],
    ids=["portable", "native", "asymmetric"],
)
def test_a_plan_keeps_its_format(settings: dict[str, Any], form: str, tmp_path: Path) -> None:
    """The file says as much as the settings did: the format, and so the bytes foretold."""
    foretold = plan(DEMO, {**GROUPS, "widths": [2, 3, 4], **settings}, tmp_path / "plan", trial=False)
    summary = quantize(DEMO, {}, tmp_path / "out", plan=tmp_path / "plan")
    assert summary["format"] == form
    assert summary["nbytes"] == foretold["nbytes"]


@pytest.fixture(scope="module")
def portable_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portable") / "plan"
    plan(DEMO, {**GROUPS, "bits": 3.3, "widths": [2, 3, 4]}, folder, trial=False)
    return folder


@pytest.mark.parametrize(
    "entry",
    [
        "2 bit g128 half",
        "3 bit g128 asymmetric",
        "3 bit g100",
        {"3 bit g128": 100, "2 bit g128": 284},
        {"3 bit g128 + 1 outliers": 384},
        {"3 bit g128": 384, "rank": 2},
    ],
    ids=str,
)
def test_an_edit_without_a_place_in_compressed_tensors(entry: Any, portable_plan: Path, tmp_path: Path) -> None:
    """The result is native then, or one error says what is wrong; it is never written as what it is not."""
    shutil.copytree(portable_plan, tmp_path / "plan")
    file = edit(tmp_path / "plan", **{"model.layers.0.mlp.up_proj": entry})
    with contextlib.suppress(RecipeError):
        summary = quantize(DEMO, {}, tmp_path / "out", plan=file)
        assert summary["format"] == "llmsqueeze"
        assert "model.layers.0.mlp.up_proj" in summary["why_native"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("9 bit g128", "no quantizer has that width"),
        ("1 bit g128", "no quantizer has that width"),
        ("three bits", "is no grid; write '3 bit g128'"),
        ({"3 bit g128": 5}, "its grids have 5 rows, the linear has"),
        ({"3 bit g128": -5}, "is no number of rows"),
        ({"3 bit g128 half + 2 outliers": 128}, "outliers want a grid with a level 0"),
        (3, "is neither a grid"),
    ],
)
def test_bad_entries_are_named(entry: object, said: str, own: Path, tmp_path: Path) -> None:
    file = edit(own, **{"model.layers.1.mlp.up_proj": entry})
    with pytest.raises(RecipeError, match=re.escape(said)) as error:
        quantize(DEMO, {}, tmp_path / "out", plan=file)
    assert "model.layers.1.mlp.up_proj" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unknown_weights_get_the_nearest_name(own: Path, tmp_path: Path) -> None:
    file = edit(own, **{"model.layers.0.mlp.up_prj": "3 bit g128"})
    with pytest.raises(RecipeError, match=r"up_prj, which the model does not have; did you mean '.*up_proj'"):
        quantize(DEMO, {}, tmp_path / "out", plan=file)


def test_a_plan_for_other_weights_is_refused(own: Path, demo_dir: Path, tmp_path: Path) -> None:
    """Same names and shapes, one number changed."""
    other = tmp_path / "other"
    shutil.copytree(demo_dir, other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RecipeError, match="is a plan for other weights"):
        quantize(Source(str(other)), {}, tmp_path / "out", plan=own)
    profile, settings = own / "profile.safetensors", {"bits": 2.5, "calibration": "demo", **FAST}
    with pytest.raises(RecipeError, match="does not match this recipe: weights"):
        quantize(Source(str(other)), settings, tmp_path / "out", profile=profile)


def test_a_profile_serves_a_run(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmsqueeze.compress import blocks

    monkeypatch.setattr(blocks, "measure", None)
    summary = quantize(
        DEMO, {"bits": 3.0, "method": "budget", **FAST}, tmp_path / "out", profile=own / planning.PROFILE
    )
    assert 2.9 < summary["bits_per_weight"] <= 3


def test_a_damaged_profile_is_refused(own: Path) -> None:
    file = own / "profile.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or no profile"):
        load(file)


def test_sizes_come_from_the_config_alone(demo_dir: Path, tmp_path: Path) -> None:
    """Without weights the same uniform plan, to the byte, as with them."""
    (tmp_path / "model").mkdir()
    shutil.copy(demo_dir / "config.json", tmp_path / "model")
    without = plan(Source(str(tmp_path / "model")), {"bits": 2.7}, tmp_path / "a", weights=False, trial=False)
    summary = quantize(DEMO, {"bits": 2.7, "method": "budget", "importance": "uniform", **FAST}, tmp_path / "out")
    assert without["nbytes"] == summary["nbytes"]
    assert without["nbytes_original"] == summary["nbytes_original"]
    assert not (tmp_path / "a" / "profile.safetensors").exists()


def test_portable_wants_groups_without_a_rest(tmp_path: Path) -> None:
    """The demo's rows have 128 and 384 columns."""
    settings = {"bits": 4.5, "portable": True, **FAST, "widths": [2, 3, 4, 8]}
    with pytest.raises(RecipeError, match=r"group size 256: .* the 384 columns of .* take --group-size 128, or -1"):
        plan(DEMO, settings | {"group_size": 256}, tmp_path / "plan", weights=False)
    found = plan(DEMO, settings, tmp_path / "plan", trial=False)
    widths = {row["pattern"].split(".")[-1]: row["rows"] for row in found["rows"]}
    assert widths["q_proj"] == widths["k_proj"] == widths["v_proj"], "one width per fusion group"
    assert 4.2 < found["bits_per_weight"] <= 4.5


def test_show_gives_the_recipe_that_makes_the_folder_again(planned: Path, tmp_path: Path) -> None:
    quantize(DEMO, {"bits": 2.5, **FAST}, tmp_path / "a", profile=planned / "profile.safetensors")
    recipe = contents(str(tmp_path / "a")).recipe
    quantize(DEMO, recipe, tmp_path / "b")
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


def test_digests_follow_the_content(demo_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_dir, tmp_path / "copy")
    first = file_digests(open_checkpoint(demo_dir))
    second = file_digests(open_checkpoint(tmp_path / "copy"))
    assert weights_digest(first) == weights_digest(second)
    known = {name: about | {"sha256": "as before"} for name, about in first.items()}
    assert file_digests(open_checkpoint(demo_dir), known) == known, "same size and time: not read again"
    (tmp_path / "copy" / "model.safetensors").touch()
    stale = file_digests(open_checkpoint(tmp_path / "copy"), known)
    assert weights_digest(stale) == weights_digest(first)


@pytest.mark.parametrize("bound", [0.3, 0.02, 0.0011])
@pytest.mark.parametrize("off", [0.4, 1.0, 3.0])
def test_the_search_finds_the_smallest_size_within_a_bound(bound: float, off: float) -> None:
    """Measured losses that are `off` times the predicted ones."""
    points = [(1 + i / 20, 2.0 ** (-2 * i / 20)) for i in range(120)]

    def attempt(bits: float) -> Round:
        predicted = 2.0 ** (-2 * (bits - 1))
        measured = off * predicted
        return Round(bits, predicted, measured, measured, measured, measured, measured <= bound)

    rounds = bisect(attempt, points, bound)
    found = min(one.bits for one in rounds if one.kept)
    exact = 1 + torch.tensor(off / bound).log2().item() / 2
    assert exact - 1e-6 <= found <= exact + WIDTH
    assert len(rounds) <= 8


@pytest.mark.parametrize(("bound", "kept"), [(10.0, [True]), (1e-9, [False])])
def test_the_search_ends_where_no_other_size_is(bound: float, kept: list[bool]) -> None:
    points = [(2.0, 1.0), (3.0, 0.1), (4.0, 0.01)]

    def attempt(bits: float) -> Round:
        measured = 10.0 ** (2 - bits)
        return Round(bits, measured, measured, measured, measured, measured, measured <= bound)

    assert [one.kept for one in bisect(attempt, points, bound)] == kept


def test_sizes_that_cannot_be_had_bound_the_search_from_below() -> None:
    points = [(1 + i / 20, 2.0 ** (-2 * i / 20)) for i in range(120)]

    def attempt(bits: float) -> Round:
        if bits < 2.4:
            return Round(bits, 0.0, 0.0, 0.0, 0.0, math.inf, False)
        measured = 2.0 ** (-2 * (bits - 1))
        return Round(bits, measured, measured, measured, measured, measured, measured <= 0.9)

    rounds = bisect(attempt, points, 0.9)
    assert 2.4 <= min(one.bits for one in rounds if one.kept) <= 2.4 + WIDTH


def test_a_size_that_cannot_be_had_ends_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed, asked = blocks.quantize, []

    def some(source: Source, recipe: Recipe, *args: Any, **named: Any) -> Any:
        asked.append(recipe.bits)
        if len(asked) == 1:
            raise BudgetError("leaves 35 bytes")
        return compressed(source, recipe, *args, **named)

    monkeypatch.setattr(search, "WIDTH", 9.0)
    monkeypatch.setattr(blocks, "quantize", some)
    options = {"max_kl": 5.0, "samples": 6, "seq_len": 48, "widths": [2, 4], "quantizer": "rtn"}
    summary = quantize(DEMO, options, tmp_path / "out", verify=False)
    assert len(summary["rounds"]) == 1
    assert summary["rounds"][0]["bits"] > asked[0]

    def none(*_args: Any, **_named: Any) -> Any:
        raise BudgetError("leaves 35 bytes")

    monkeypatch.setattr(blocks, "quantize", none)
    with pytest.raises(BudgetError, match="leaves 35 bytes"):
        quantize(DEMO, options, tmp_path / "none")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_smallest_result_within_a_bound_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "WIDTH", 0.6)
    summary = quantize(DEMO, {"max_kl": 0.08, **FAST}, tmp_path / "out")
    assert summary["kl_mean"] <= 0.08
    beyond = [one for one in summary["rounds"] if not one["kept"]]
    assert beyond, "a smaller one was tried"
    assert max(one["bits"] for one in beyond) < summary["bits_per_weight"]
    assert open_checkpoint(tmp_path / "out").nbytes == summary["nbytes"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
