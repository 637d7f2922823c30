"""Plans and profiles: measured once, written, edited, refused if they do not fit, and followed to the byte."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import TEXT

from llmsqueeze.allocation.plan_yaml import PROFILE
from llmsqueeze.compress import job as jobs
from llmsqueeze.compress.plan import plan
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.formats.entries import read_entries
from llmsqueeze.formats.record import read_record
from llmsqueeze.measure.profile import load
from llmsqueeze.model import original
from llmsqueeze.model.checkpoint import Checkpoint, file_digests, open_checkpoint, weights_digest
from llmsqueeze.model.original import Source
from llmsqueeze.model.skeleton import Skeleton, build_skeleton
from llmsqueeze.progress import Progress
from llmsqueeze.publish.folder import read_public
from llmsqueeze.publish.report import report_page
from llmsqueeze.publish.show import contents

FAST: dict[str, Any] = {**TEXT, "method": "budget", "quantizer": "rtn", "widths": [1, 2, 3, 4]}


@pytest.fixture(scope="module")
def folder(demo_of: Callable[[int], Path]) -> Path:
    return demo_of(1)


@pytest.fixture(scope="module")
def demo(folder: Path) -> Source:
    return Source(str(folder))


@pytest.fixture(scope="module")
def planned(demo: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model's plan at 2.5 bits and its profile."""
    folder = tmp_path_factory.mktemp("plan") / "plan"
    plan(demo, {"bits": 2.5, **FAST}, folder, trial=False)
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


@pytest.mark.parametrize("settings", [{"bits": 2.5}, {"bits": 3.2, "granularity": "linear"}, {"size": "250kB"}])
def test_the_budget_is_kept_and_used(demo: Source, settings: dict[str, Any], planned: Path, tmp_path: Path) -> None:
    shutil.copy(planned / "profile.safetensors", tmp_path)
    result = plan(demo, settings | FAST, tmp_path, trial=False)
    if "bits" in settings:
        spent, allowed = result["bits_per_weight"], settings["bits"]
    else:
        spent, allowed = result["nbytes"], 250_000
    smallest_step = 0.05 if "granularity" in settings else 0.01
    assert (1 - smallest_step) * allowed <= spent <= allowed


def test_a_plan_by_the_trace_keeps_the_budget_and_promises_nothing(demo: Source, planned: Path, tmp_path: Path) -> None:
    """An average over a linear ranks it, but is no loss; and a profile by costs does not serve."""
    shutil.copy(planned / "profile.safetensors", tmp_path)
    before = (tmp_path / "profile.safetensors").read_bytes()
    settings = {"bits": 2.5, "importance": "trace"} | FAST
    result = plan(demo, settings, tmp_path, trial=False)
    assert 2.4 < result["bits_per_weight"] <= 2.5
    assert result["predicted_loss_increase"] is None
    assert all(row["predicted_loss_increase"] is None for row in result["rows"])
    assert result["curve"] == []
    assert (tmp_path / "profile.safetensors").read_bytes() != before
    by_cost = plan(demo, settings | {"importance": "cost"}, tmp_path / "cost", trial=False)
    assert by_cost["weights"] != result["weights"]


def test_a_second_plan_reads_no_weight(demo: Source, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read_raw", refuse)
    monkeypatch.setattr(jobs, "measure", refuse)
    result = plan(demo, {"bits": 3.5, **FAST}, own, trial=False)
    assert 3.4 < result["bits_per_weight"] <= 3.5


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({**FAST, "seed": 1}, "calibration"),
        ({**FAST, "group_size": 32}, "no costs for 1 bit g32"),
        ({**FAST, "products": "bfloat16"}, "products float32, not bfloat16"),
        ({**TEXT, "method": "mixllm", "importance": "salience"}, "labels model, not text"),
    ],
)
def test_a_profile_that_does_not_serve_is_measured_anew(
    demo: Source, settings: dict[str, Any], reason: str, own: Path
) -> None:
    notes: list[str] = []

    class Listening(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    plan(demo, {"bits": 2.5} | settings, own, trial=False, progress=Listening())
    note = next(note for note in notes if "few for linears" not in note)
    assert reason in note
    assert "measured again" in note


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        (FAST, {"costs", "row_gradient"}),
        ({**TEXT, "method": "coded"}, {"row_gradient", "curves"}),
        ({**TEXT, "method": "gptq", "bits": 3}, set()),
        ({**TEXT, "method": "layerwise", "importance": "lim"}, {"lim"}),
        ({**TEXT, "method": "layerwise", "importance": "zd"}, {"zd"}),
        ({**TEXT, "method": "mixllm", "bits": 3, "importance": "salience"}, {"salience"}),
    ],
)
def test_a_plan_measures_what_its_recipe_needs(
    demo: Source, settings: dict[str, Any], measured: set[str], tmp_path: Path
) -> None:
    """More would be paid with samples and gradients; the salience of all widths takes the same gradients."""
    plan(demo, {"bits": 2.5} | settings, tmp_path, trial=False)
    profile = load(tmp_path / PROFILE)
    possible = {"costs", "row_gradient", "curves", "salience", "candidates", "lim", "zd"}
    assert {name for name in possible if getattr(profile, name)} == measured
    assert profile.salience_widths == ((2, 3, 4) if "salience" in measured else ())
    assert len(profile.groups) == 4


def test_a_plan_followed_gives_what_the_command_gives(demo: Source, planned: Path, tmp_path: Path) -> None:
    """One command, or plan and then quantize: the same bytes; and the plan foretold how many."""
    quantize(demo, {"bits": 2.5, **FAST}, tmp_path / "direct")
    summary = quantize(demo, {}, tmp_path / "followed", plan=planned)
    assert shards(tmp_path / "direct") == shards(tmp_path / "followed")
    foretold = yaml.safe_load((planned / "plan.yaml").read_text())
    assert foretold["nbytes"] == summary["nbytes"] == open_checkpoint(tmp_path / "followed").nbytes
    assert foretold["bits_per_weight"] == summary["bits_per_weight"] <= 2.5
    assert summary["predicted_loss_increase"] == pytest.approx(foretold["predicted_loss_increase"])


def test_an_edited_plan_is_followed(
    demo: Source, own: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    file = edit(own, **{up: "8 bit g32", down: None})
    progress, notes = Progress(), list[str]()
    monkeypatch.setattr(progress, "note", notes.append)
    quantize(demo, {}, tmp_path / "out", plan=file, progress=progress)
    assert f"1 of 7 linears are not in {file}: they stay as they are" in notes
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["weights"]
    assert [(s["bits"], s["group_size"]) for s in entries[up]["parts"]] == [(8, 32)]
    assert down not in entries
    stored, original = open_checkpoint(tmp_path / "out"), open_checkpoint(folder)
    assert torch.equal(stored.read(f"{down}.weight"), original.read(f"{down}.weight"))


GROUPS = {**TEXT, "method": "budget", "granularity": "group", "levels": "integer", "quantizer": "rtn"}


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"bits": 3.3}, "compressed-tensors"),
        ({"bits": 3.3, "portable": False}, "llmsqueeze"),
        ({"bits": 3.6, "symmetric": False}, "llmsqueeze"),
    ],
    ids=["portable", "native", "asymmetric"],
)
def test_a_plan_keeps_its_format(demo: Source, settings: dict[str, Any], form: str, tmp_path: Path) -> None:
    """The file says as much as the settings did: the format, and so the bytes foretold."""
    foretold = plan(demo, {**GROUPS, "widths": [2, 3, 4], **settings}, tmp_path / "plan", trial=False)
    summary = quantize(demo, {}, tmp_path / "out", plan=tmp_path / "plan")
    assert summary["format"] == form
    assert summary["nbytes"] == foretold["nbytes"]


@pytest.fixture(scope="module")
def portable_plan(demo: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portable") / "plan"
    plan(demo, {**GROUPS, "bits": 3.3, "widths": [2, 3, 4]}, folder, trial=False)
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
def test_an_edit_without_a_place_in_compressed_tensors(
    demo: Source, entry: Any, portable_plan: Path, tmp_path: Path
) -> None:
    """The result is native then, or one error says what is wrong; it is never written as what it is not."""
    shutil.copytree(portable_plan, tmp_path / "plan")
    file = edit(tmp_path / "plan", **{"model.layers.0.mlp.up_proj": entry})
    with contextlib.suppress(RecipeError):
        summary = quantize(demo, {}, tmp_path / "out", plan=file)
        assert summary["format"] == "llmsqueeze"
        assert "model.layers.0.mlp.up_proj" in summary["why_native"]


@pytest.mark.parametrize(
    ("entry", "expected"),
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
def test_bad_entries_are_named(demo: Source, entry: object, expected: str, own: Path, tmp_path: Path) -> None:
    file = edit(own, **{"model.layers.0.mlp.up_proj": entry})
    with pytest.raises(RecipeError, match=re.escape(expected)) as error:
        quantize(demo, {}, tmp_path / "out", plan=file)
    assert "model.layers.0.mlp.up_proj" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unknown_weights_get_the_nearest_name(demo: Source, own: Path, tmp_path: Path) -> None:
    file = edit(own, **{"model.layers.0.mlp.up_prj": "3 bit g128"})
    with pytest.raises(RecipeError, match=r"up_prj, which the model does not have; did you mean '.*up_proj'"):
        quantize(demo, {}, tmp_path / "out", plan=file)


def test_a_plan_for_other_weights_is_refused(own: Path, folder: Path, tmp_path: Path) -> None:
    """Same names and shapes, one number changed."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RecipeError, match="is a plan for other weights"):
        quantize(Source(str(other)), {}, tmp_path / "out", plan=own)
    profile, settings = own / "profile.safetensors", {"bits": 2.5, **FAST}
    with pytest.raises(RecipeError, match="does not match this recipe: weights"):
        quantize(Source(str(other)), settings, tmp_path / "out", profile=profile)


def test_a_profile_serves_a_run(demo: Source, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "measure", None)
    summary = quantize(demo, {"bits": 3.0, "method": "budget", **FAST}, tmp_path / "out", profile=own / PROFILE)
    assert 2.9 < summary["bits_per_weight"] <= 3


def test_a_damaged_profile_is_refused(own: Path) -> None:
    file = own / "profile.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or no profile"):
        load(file)


def test_sizes_come_from_the_config_alone(demo: Source, folder: Path, tmp_path: Path) -> None:
    """Without weights the same uniform plan, to the byte, as with them."""
    (tmp_path / "model").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "model")
    without = plan(Source(str(tmp_path / "model")), {"bits": 2.7}, tmp_path / "a", weights=False, trial=False)
    settings = {"method": "budget", "quantizer": "rtn", "bits": 2.7, "importance": "uniform"}
    summary = quantize(demo, settings, tmp_path / "out")
    assert without["nbytes"] == summary["nbytes"]
    assert without["nbytes_original"] == summary["nbytes_original"]
    assert not (tmp_path / "a" / "profile.safetensors").exists()


def test_portable_wants_groups_without_a_rest(demo: Source, tmp_path: Path) -> None:
    """The demo's rows have 128 and 384 columns."""
    settings = {"bits": 4.5, "portable": True, **FAST, "widths": [2, 3, 4, 8]}
    with pytest.raises(RecipeError, match=r"group size 256: .* the 384 columns of .* take --group-size 128, or -1"):
        plan(demo, settings | {"group_size": 256}, tmp_path / "plan", weights=False)
    summary = plan(demo, settings, tmp_path / "plan", trial=False)
    widths = {row["pattern"].split(".")[-1]: row["rows"] for row in summary["rows"]}
    assert widths["q_proj"] == widths["k_proj"] == widths["v_proj"], "one width per fusion group"
    assert 4.2 < summary["bits_per_weight"] <= 4.5


def test_show_gives_the_recipe_that_makes_the_folder_again(demo: Source, planned: Path, tmp_path: Path) -> None:
    quantize(demo, {"bits": 2.5, **FAST}, tmp_path / "a", profile=planned)
    recipe = contents(str(tmp_path / "a")).recipe
    quantize(demo, recipe, tmp_path / "b")
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


def test_digests_follow_the_content(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    first = file_digests(open_checkpoint(folder))
    second = file_digests(open_checkpoint(tmp_path / "copy"))
    assert weights_digest(first) == weights_digest(second)
    recorded = {name: about | {"sha256": "as before"} for name, about in first.items()}
    assert file_digests(open_checkpoint(folder), recorded) == recorded, "same size and time: not read again"
    (tmp_path / "copy" / "model.safetensors").touch()
    stale = file_digests(open_checkpoint(tmp_path / "copy"), recorded)
    assert weights_digest(stale) == weights_digest(first)


def test_a_run_lays_the_model_out_once(
    demo: Source, planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def counted(*args: Any) -> Skeleton:
        opened.append(args)
        return build_skeleton(*args)

    monkeypatch.setattr(original, "build_skeleton", counted)
    quantize(demo, {}, tmp_path / "planned", plan=planned, verify=False)
    assert len(opened) == 1
    settings = {"bits": 2.5, **FAST}
    quantize(demo, settings, tmp_path / "measured", profile=planned / PROFILE, verify=False)
    assert len(opened) == 2


RANKS = {"bits": 2.5, **FAST, "samples": 16, "lorc_rank": "auto"}


@pytest.mark.thorough
def test_ranks_are_bought_within_the_budget_and_promise_more(demo: Source, own: Path, tmp_path: Path) -> None:
    """By round to nearest, whose error has directions worth their bytes; and a plan with ranks is followed."""
    direct = quantize(demo, RANKS, tmp_path / "direct")
    weights = json.loads((tmp_path / "direct" / "config.json").read_text())["quantization_config"]["weights"].values()
    ranks = [spec["rank"] for entry in weights for spec in entry["parts"] if spec["part"] == "lowrank"]
    assert ranks, "no rank was bought"
    assert len(set(ranks)) > 1, "all linears have the same"
    assert direct["bits_per_weight"] <= 2.5
    without = plan(demo, RANKS | {"lorc_rank": 0}, own, trial=False)["predicted_loss_increase"]
    assert direct["predicted_loss_increase"] < without
    before = (own / PROFILE).read_bytes()
    plan(demo, RANKS, own, trial=False)
    assert (own / PROFILE).read_bytes() != before, "a profile without gains is measured again"
    assert "rank:" in (own / "plan.yaml").read_text()
    quantize(demo, {}, tmp_path / "followed", plan=own)
    assert shards(tmp_path / "direct") == shards(tmp_path / "followed")


def test_a_profile_without_gains_is_refused(demo: Source, planned: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no gains of ranks"):
        quantize(demo, {"bits": 2.5, **FAST, "lorc_rank": "auto"}, tmp_path / "out", profile=planned / PROFILE)


def test_a_plan_names_the_blocks_of_each_width_and_their_scores(tmp_path: Path) -> None:
    settings = {"samples": 2, "seq_len": 32, "method": "layerwise", "bits": 3.3, "quantizer": "rtn"}
    result = plan(Source("demo"), settings, tmp_path / "plan", trial=False)
    (scores,) = result["block_scores"].values()
    assert len(scores) == len(result["blocks"]) == 4
    weights = yaml.safe_load((tmp_path / "plan/plan.yaml").read_text())["weights"]
    for row in result["rows"]:
        kind = row["pattern"].rpartition("*")[2]
        told = {block: bits for bits, blocks in row["blocks"].items() for block in blocks}
        assert told == {i: weights[f"model.layers.{i}{kind}"].split()[0] for i in range(4)}
    assert {bits for row in result["rows"] for bits in row["blocks"]} == {"2", "4"}


@pytest.mark.parametrize("importance", ["lim", "zd"])
def test_layerwise_spends_what_is_too_little_for_a_block(importance: str, tmp_path: Path) -> None:
    """At 2.5 bits no whole block of the demo fits: fusion groups of the most important ones do, also without text."""
    text = {"samples": 2, "seq_len": 32} if importance == "lim" else {}
    settings = {**text, "method": "layerwise", "importance": importance, "bits": 2.5, "quantizer": "rtn"}
    summary = quantize(Source("demo"), settings, tmp_path / "out")
    assert 0.97 * 2.5 <= summary["bits_per_weight"] <= 2.5
    scores = summary["block_scores"][importance]
    assert len(scores) == 4
    assert read_record(tmp_path / "out")["block_scores"] == {importance: list(scores)}
    assert (summary["format"], summary["opens"]["vllm"]) == ("compressed-tensors", "")
    linears = {name: entry.specs[0]["bits"] for name, entry in read_entries(open_checkpoint(tmp_path / "out")).items()}
    assert set(linears.values()) == {2, 4}
    wide = [[name for name, bits in linears.items() if f".layers.{i}." in name and bits == 4] for i in range(4)]
    assert 4 <= max(map(len, wide)) < 7, "of no block all linears, of one more than the smallest"
    best = max(range(4), key=lambda i: scores[i] if importance == "lim" else -scores[i])
    assert len(wide[best]) == max(map(len, wide)), "the scores that are told are those that ranked the blocks"
    html = report_page(read_public(tmp_path / "out"))
    assert f"<h3>Blocks by {importance.upper()}</h3>" in html
    assert f'<td class="num">{best}</td><td class="num" data-value="{scores[best]}">' in html
    for row in contents(str(tmp_path / "out")).rows:
        names = [row.pattern.replace("*", str(block)) for block in row.blocks]
        assert {linears[name] for name in names} == {int(row.parts.split()[0])}
        assert len(names) == row.count
    for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for i in range(4):
            assert (
                len({bits for name, bits in linears.items() if f".layers.{i}." in name and name.endswith(fused)}) == 1
            )
