"""Coded weights from the command to the opened model: budgets, plans, damage, exports, distillation, embeddings."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import KINDS, TEXT, command, refused, tensors_of, thorough
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmsqueeze
from llmsqueeze import parts
from llmsqueeze.compress import quantize as quantize_module
from llmsqueeze.compress import search
from llmsqueeze.compress.plan import plan
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.distillation.distill import distill
from llmsqueeze.distillation.settings import make_distillation
from llmsqueeze.errors import CheckpointError, RecipeError, UnsupportedError
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.formats.export import export
from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.original import Source
from llmsqueeze.parts import Coded, Integers
from llmsqueeze.publish.show import contents

TOKENS = torch.arange(3, 40)[None]
LINEAR = "model.layers.0.mlp.up_proj"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=TOKENS).logits
    return output


def weight_of(folder: Path, linear: str) -> Tensor:
    checkpoint = open_checkpoint(folder)
    return parts.sum_of_parts(read_parts(checkpoint, read_entries(checkpoint)[linear]))


@pytest.fixture(scope="module")
def folder(demo_of: Callable[[int], Path]) -> Path:
    return demo_of(2)


@pytest.fixture(scope="module")
def demo(folder: Path) -> Source:
    return Source(str(folder))


@pytest.fixture(scope="module")
def block(demo_of: Callable[[int], Path]) -> Path:
    """The demo's first block, for what needs no second."""
    return demo_of(1)


@pytest.fixture(scope="module")
def demo_block(block: Path) -> Source:
    return Source(str(block))


@pytest.fixture(scope="module")
def coded(compressed: Callable[[str], Path]) -> Path:
    """The two-block demo at 2.5 bits."""
    return compressed("coded")


@pytest.fixture(scope="module")
def ends(demo_block: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block at 3 bits, the embeddings among them."""
    out = tmp_path_factory.mktemp("ends") / "demo"
    quantize(demo_block, {"bits": 3.0, "method": "coded", "code_embeddings": True, **TEXT}, out)
    return out


# --------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("settings", [{"bits": 1.7, "seed": 3}, {"size": "220kB"}], ids=str)
def test_the_result_is_under_the_budget_by_half_a_percent_at_most(
    demo_block: Source, settings: dict[str, Any], tmp_path: Path
) -> None:
    summary = quantize(demo_block, settings | TEXT | {"method": "coded"}, tmp_path / "out")
    kept = contents(str(tmp_path / "out")).kept_nbytes
    if "bits" in settings:
        assert settings["bits"] * 0.995 <= summary["bits_per_weight"] <= settings["bits"]
    else:
        assert (220_000 - kept) * 0.995 <= summary["nbytes"] - kept <= 220_000 - kept
    on_disk = open_checkpoint(tmp_path / "out").nbytes
    assert on_disk == summary["nbytes"]


def test_a_budget_below_steps_and_tables_is_refused_before_anything_is_measured(folder: Path, tmp_path: Path) -> None:
    message = refused("quantize", folder, "--method", "coded", "--size", "60kB", "--out", tmp_path / "out")
    assert "too small: with steps and tables alone the linears take" in message
    assert not (tmp_path / "out").exists()


def test_the_smallest_result_within_a_bound_is_coded(
    demo_block: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "WIDTH", 1.0)
    monkeypatch.setattr(quantize_module, "HELD_BACK", 8)
    summary = quantize(demo_block, {**TEXT, "max_kl": 3.0}, tmp_path / "out", verify=False)
    assert summary["method"] == "coded"
    assert summary["kl_mean"] <= 3.0
    assert open_checkpoint(tmp_path / "out").nbytes == summary["nbytes"]


# ----------------------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def planned(demo: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "plan"
    plan(demo, KINDS["coded"], folder, trial=False)
    return folder


def test_the_same_command_and_a_plan_followed_give_the_same_bytes(
    demo: Source, planned: Path, coded: Path, tmp_path: Path
) -> None:
    quantize(demo, {}, tmp_path / "out", plan=planned)
    direct, followed = tensors_of(coded), tensors_of(tmp_path / "out")
    assert all(torch.equal(direct[name], followed[name]) for name in direct | followed)
    assert set(yaml.safe_load((planned / "plan.yaml").read_text())["weights"].values()) == {"coded"}


def test_an_edited_plan_gives_one_linear_finer_steps_within_the_same_budget(
    demo: Source, planned: Path, coded: Path, tmp_path: Path
) -> None:
    shutil.copytree(planned, tmp_path / "plan")
    content = yaml.safe_load((tmp_path / "plan" / "plan.yaml").read_text())
    content["weights"][LINEAR] = "coded x0.25"
    (tmp_path / "plan" / "plan.yaml").write_text(yaml.safe_dump(content))
    summary = quantize(demo, {}, tmp_path / "out", plan=tmp_path / "plan")
    assert 2.5 * 0.995 <= summary["bits_per_weight"] <= 2.5

    def words(folder: Path) -> int:
        return len(tensors_of(folder)[f"{LINEAR}.parts.0.words"])

    numel = weight_of(coded, LINEAR).numel()
    assert 16 * (words(tmp_path / "out") - words(coded)) / numel > 1, "about two bits, but all pay for them"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("coded x0", "from 1/64 of the model's to 64 times"),
        ("coded x1000", "from 1/64 of the model's to 64 times"),
        ("3 bit g128", "of method coded there is 'coded'"),
        ({"coded": 3}, "rows are coded, not 3"),
        ({"coded": 384, "outliers": -1}, "is no number of rows"),
    ],
    ids=str,
)
def test_bad_entries_are_named(demo: Source, entry: object, expected: str, planned: Path, tmp_path: Path) -> None:
    shutil.copytree(planned, tmp_path / "plan")
    content = yaml.safe_load((tmp_path / "plan" / "plan.yaml").read_text())
    content["weights"][LINEAR] = entry
    (tmp_path / "plan" / "plan.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="up_proj") as caught:
        quantize(demo, {}, tmp_path / "out", plan=tmp_path / "plan")
    assert expected in str(caught.value)


def test_a_profile_without_coded_costs_does_not_serve(demo_block: Source, tmp_path: Path) -> None:
    plan(demo_block, {"bits": 2.5, "widths": [2, 3], "quantizer": "rtn", **TEXT}, tmp_path / "plan", trial=False)
    with pytest.raises(RecipeError, match="does not match"):
        quantize(demo_block, {"bits": 2.5, **TEXT}, tmp_path / "out", profile=tmp_path / "plan" / "profile.safetensors")


# --------------------------------------------------------------------------------------------------- opening


def test_every_way_of_opening_gives_the_same_numbers(coded: Path, tmp_path: Path) -> None:
    model = llmsqueeze.load(str(coded))
    assert not any(isinstance(module, SumOfParts) for module in model.modules()), "decoded into ordinary layers"
    weight = model.get_parameter(f"{LINEAR}.weight")
    assert torch.equal(weight, weight_of(coded, LINEAR).to(weight.dtype))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(coded)), logits(model))
    export(str(coded), "dense", tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(model))
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_integers_stay_in_memory_on_request(coded: Path, tmp_path: Path) -> None:
    dense, kept = llmsqueeze.load(str(coded)), llmsqueeze.load(str(coded), keep_codes=True)
    layer = kept.get_submodule(LINEAR)
    assert isinstance(layer, SumOfParts)
    assert [spec["part"] for spec in layer.specs] == [Integers.kind]
    assert {name: tensor.dtype for name, tensor in layer.named_buffers()}["parts.0.codes"] == torch.int8
    assert torch.equal(logits(kept), logits(dense))
    kept.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(llmsqueeze.load(str(tmp_path / "saved"), keep_codes=True)), logits(dense))


def test_what_is_said_of_the_folder(coded: Path) -> None:
    config = json.loads((coded / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 5
    code, stdout, _ = command("show", coded)
    assert code == 0
    assert "coded   x2" in stdout
    assert command("check", coded, "--target", "native")[0] == 0


@pytest.mark.parametrize(
    ("version", "told"),
    [
        (99, r"version 99 is not read by this version.*a newer llmsqueeze reads it"),
        (4, "no checksums: compress the original"),
    ],
)
def test_another_format_version_is_refused_by_name(coded: Path, tmp_path: Path, version: int, told: str) -> None:
    shutil.copytree(coded, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=told):
        llmsqueeze.load(str(tmp_path / "other"))


def test_what_is_decoded_gives_its_streams_back_at_once(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the dense model and of what is not decoded yet, not of both."""
    decode, seen, alive = SumOfParts.as_linear, [], []

    def watched(self: SumOfParts, dtype: torch.dtype) -> torch.nn.Module:
        alive.append(sum(one() is not None for one in seen))
        seen.append(weakref.ref(self))
        return decode(self, dtype)

    monkeypatch.setattr(SumOfParts, "as_linear", watched)
    llmsqueeze.load(str(coded))
    assert len(alive) == 14
    assert max(alive) <= 1


SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "a word": ({"rows_per_stream": "x"}, "rows_per_stream of .* is 'x'.*a whole number from 1"),
    "nothing": ({"rows_per_stream": None}, "rows_per_stream of .* is None"),
    "below the least": ({"words": -5}, "words of .* is -5"),
    "a fraction": ({"escapes": 0.5}, "escapes of .* is 0.5"),
    "another kind": ({"part": "codde"}, "a part of kind 'codde'; known: affine"),
    "no dtype": ({"dtype": 3}, "dtype of .* is 3"),
    "a kind with nothing to it": ({"part": "lowrank"}, "incompletely: 'rank'"),
}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("verb", ["check", "show", "eval"])
def test_a_config_that_cannot_be_is_told_in_one_line(kind: str, verb: str, coded: Path, tmp_path: Path) -> None:
    changed, told = SPECS[kind]
    shutil.copytree(coded, tmp_path / "hurt")
    config = json.loads((tmp_path / "hurt" / "config.json").read_text())
    config["quantization_config"]["weights"][LINEAR]["parts"][0] |= changed
    (tmp_path / "hurt" / "config.json").write_text(json.dumps(config))
    text = ["--text", "demo"] if verb == "eval" else []
    code, stdout, stderr = command(verb, tmp_path / "hurt", *text)
    assert code == 2
    assert re.search(told, " ".join((stdout + stderr).split()))


# ---------------------------------------------------------------------------------------------------- damage


def flipped(tensor: Tensor) -> Tensor:
    tensor.view(torch.uint8)[tensor.view(torch.uint8).numel() // 2] ^= 16
    return tensor


def shifted(tensor: Tensor) -> Tensor:
    tensor[0] += 1
    tensor[1] -= 1
    return tensor


DAMAGES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a bit in a stream": ("words", flipped),
    "lengths out of step": ("lengths", shifted),
    "lengths that do not sum": ("lengths", lambda tensor: tensor + 1),
    "a table without its end": ("tables", lambda tensor: tensor.clamp(min=1)),
    "another table": ("tables", lambda tensor: torch.cat([tensor[:1] // 2, tensor[1:]])),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_by_check_and_load(name: str, coded: Path, tmp_path: Path) -> None:
    kind, change = DAMAGES[name]
    shutil.copytree(coded, tmp_path / "bad")
    tensor = f"{LINEAR}.parts.0.{kind}"
    index = json.loads((tmp_path / "bad" / "model.safetensors.index.json").read_text())
    file = tmp_path / "bad" / index["weight_map"][tensor]
    tensors = load_file(file)
    tensors[tensor] = change(tensors[tensor].clone())
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=LINEAR):
        llmsqueeze.load(str(tmp_path / "bad"))
    code, stdout, stderr = command("check", tmp_path / "bad")
    assert code == 2
    assert LINEAR in "".join((stdout + stderr).split())


# ----------------------------------------------------------------------------------------------- composition


def test_outliers_keep_their_value_and_factors_help(demo_block: Source, block: Path, tmp_path: Path) -> None:
    settings = {"method": "coded", "bits": 2.5, "outliers": 0.002, "outlier_scope": "global", "lorc_rank": 1, **TEXT}
    summary = quantize(demo_block, settings, tmp_path / "out")
    assert summary["bits_per_weight"] <= 2.5
    assert summary["outliers"] > 0
    stored, original = open_checkpoint(tmp_path / "out"), open_checkpoint(block)
    kinds = set()
    for name, entry in read_entries(stored).items():
        stored_parts = read_parts(stored, entry)
        kinds |= {part.kind for part in stored_parts}
        for part in stored_parts:
            if isinstance(part, parts.Sparse):
                mask = torch.zeros(entry.shape, dtype=torch.bool)
                rows = torch.arange(entry.shape[0]).repeat_interleave(part.counts)
                mask[rows, part.columns] = True
                weight = original.read(f"{name}.weight").float()
                assert torch.equal(parts.sum_of_parts(stored_parts)[mask], weight[mask])
    assert {"integers", "sparse"} <= kinds


@pytest.mark.thorough
def test_distilled_steps_are_nearer_to_the_original(folder: Path, demo: Source, tmp_path: Path) -> None:
    coded = tmp_path / "coded"
    quantize(demo, {"bits": 1.6, **TEXT}, coded)
    options = {"calibration": "demo", "steps": 8, "samples": 12, "seq_len": 48, "held_back": 4}
    settings = make_distillation(options | {"lr": 5e-3, "batch_size": 4})  # a step size moves by a sixteenth octave
    summary = distill(str(coded), str(folder), settings, tmp_path / "out", device="cpu")
    assert summary["kl_after"] < summary["kl_before"]
    assert abs(summary["nbytes"] / open_checkpoint(coded).nbytes - 1) < 0.005
    assert open_checkpoint(tmp_path / "out").nbytes == summary["nbytes"]
    checkpoints = [open_checkpoint(folder) for folder in (coded, tmp_path / "out")]
    first, second = (read_parts(c, read_entries(c)["model.layers.1.mlp.up_proj"])[0] for c in checkpoints)
    assert isinstance(first, Integers)
    assert isinstance(second, Integers)
    assert torch.equal(first.values(), second.values()), "steps are trained, integers are not"
    assert not torch.equal(first.dense(), second.dense())


def test_blocks_are_distilled_too(folder: Path, coded: Path, tmp_path: Path) -> None:
    options = {"calibration": "demo", "steps": 3, "samples": 6, "seq_len": 48, "held_back": 3, "blockwise": True}
    summary = distill(str(coded), str(folder), make_distillation(options), tmp_path / "out", device="cpu")
    assert summary["kl_after"] <= summary["kl_before"]
    assert command("check", tmp_path / "out", "--target", "native")[0] == 0


def test_blocks_behind_coded_embeddings_are_distilled_as_the_opened_model_has_them(
    block: Path, ends: Path, tmp_path: Path
) -> None:
    """What is measured block by block is what the whole model gives, at both ends too."""
    options = {"calibration": "demo", "steps": 2, "samples": 6, "seq_len": 48, "held_back": 3, "lr": 1e-3}
    summaries = [
        distill(str(ends), str(block), make_distillation(options | {"blockwise": way}), out, device="cpu")
        for way, out in ((True, tmp_path / "blockwise"), (False, tmp_path / "whole"))
    ]
    assert summaries[0]["kl_before"] == pytest.approx(summaries[1]["kl_before"], rel=1e-4)
    assert summaries[0]["kl_after"] <= summaries[0]["kl_before"]
    assert command("check", tmp_path / "blockwise", "--target", "native")[0] == 0


# --------------------------------------------------------------------------------------------------- exports


def test_rounded_again_for_others_the_more_bits_the_less_it_costs(coded: Path, tmp_path: Path) -> None:
    costs = []
    for bits in (3, 4, 6):
        out = tmp_path / str(bits)
        summary = export(str(coded), "compressed-tensors", out, bits=bits)
        assert summary["rerounded"] == f"{bits} bit g128"
        costs.append(summary["predicted_loss_increase"])
        assert command("check", out, "--target", "transformers")[0] == 0
        rounded, weight = weight_of(out, LINEAR), weight_of(coded, LINEAR)
        assert float((rounded - weight).norm() / weight.norm()) < 2.0 ** (1 - bits)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 10 * costs[2] > 0


def test_a_row_count_that_differs_is_named(coded: Path, tmp_path: Path) -> None:
    shutil.copytree(coded, tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    config["quantization_config"]["weights"][LINEAR]["shape"][0] -= 16
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"up_proj is \[368, 128\]; the model needs"):
        llmsqueeze.load(str(tmp_path / "bad"))
    code, stdout, stderr = command("check", tmp_path / "bad")
    assert code == 2
    assert LINEAR in "".join((stdout + stderr).split())


def test_what_is_not_rounded_again_takes_no_width(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--bits 4 does not apply: only --to compressed-tensors rounds"):
        export(str(coded), "dense", tmp_path / "out", bits=4)
    with pytest.raises(RecipeError, match="bits is 9; it must be a whole number from 2 to 8"):
        export(str(coded), "compressed-tensors", tmp_path / "out", bits=9)
    with pytest.raises(RecipeError, match="group size 100: it does not divide"):
        export(str(coded), "compressed-tensors", tmp_path / "out", group_size=100)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_are_coded_and_stay_tied(ends: Path, coded: Path) -> None:
    model = llmsqueeze.load(str(ends))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    entry = read_entries(open_checkpoint(ends))
    name = next(iter(entry))
    assert name == "model.embed_tokens"
    assert (embeddings.weight is head.weight) is (len(entry) == 8)
    dense = weight_of(ends, name)
    assert torch.equal(embeddings.weight, dense.to(embeddings.weight.dtype))
    assert f"{name}.weight" not in open_checkpoint(ends).tensors
    assert contents(str(ends)).kept_nbytes < contents(str(coded)).kept_nbytes / 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(ends)), logits(model))


def test_embeddings_are_exported_dense(ends: Path, tmp_path: Path) -> None:
    export(str(ends), "dense", tmp_path / "dense")
    model = llmsqueeze.load(str(ends))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(model))
    export(str(ends), "compressed-tensors", tmp_path / "rounded", bits=8)
    assert command("check", tmp_path / "rounded", "--target", "transformers")[0] == 0
    embedding = open_checkpoint(tmp_path / "rounded").read("model.embed_tokens.weight")
    assert torch.equal(embedding, weight_of(ends, "model.embed_tokens").to(embedding.dtype))


@pytest.mark.thorough
def test_untied_ends_are_coded_both(random_model: Callable[..., Path], demo_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "untied"
    shutil.copytree(random_model("llama"), path)
    for file in demo_dir.glob("token*"):
        shutil.copy(file, path)
    summary = quantize(
        Source(str(path)),
        {
            **TEXT,
            "calibration": "self",
            "samples": 1,
            "seq_len": 16,
            "bits": 4.0,
            "method": "coded",
            "code_embeddings": True,
        },
        tmp_path / "out",
    )
    assert summary["bits_per_weight"] <= 4.0
    assert {"model.embed_tokens", "lm_head"} <= read_entries(open_checkpoint(tmp_path / "out")).keys()
    model = llmsqueeze.load(str(tmp_path / "out"))
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, weight_of(tmp_path / "out", "lm_head").to(model.lm_head.weight.dtype))


# --------------------------------------------------------------------------------------------------- packing

PACKED: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 3},
    "asymmetric": {"method": "rtn", "bits": 4, "symmetric": False, "group_size": 64},
    "dual": {"method": "dbllm", "quantizer": "rtn"},
    "outliers": {"method": "gwq", "quantizer": "rtn", "bits": 2, **TEXT},
    "rows": {"method": "mixllm", "quantizer": "rtn", "low_bits": 2, "high_bits": 4, **TEXT},
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_codes_are_the_same_weights_in_fewer_bytes(demo_block: Source, name: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    quantize(demo_block, {**PACKED[name], "portable": False}, plain)
    summary = quantize(demo_block, {**PACKED[name], "pack": "rans"}, packed)
    assert summary["format"] == "llmsqueeze"
    assert open_checkpoint(packed).nbytes < open_checkpoint(plain).nbytes
    for linear in read_entries(open_checkpoint(plain)):
        assert torch.equal(weight_of(plain, linear), weight_of(packed, linear))
    assert any(kind.endswith(".words") for kind in tensors_of(packed))
    model = llmsqueeze.load(str(packed))
    assert torch.equal(logits(model), logits(llmsqueeze.load(str(plain))))
    layer = model.get_submodule(LINEAR)
    assert isinstance(layer, SumOfParts)
    assert not any("streams" in spec for spec in layer.specs), "decoded once"


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"method": "budget", "widths": [1, 2, 3, 4, 5]}, 0.97),
        thorough({"method": "mixllm", "low_bits": 2, "high_bits": 4}, 0.97),
        thorough({"method": "layerwise", "low_bits": 2, "high_bits": 3, "importance": "zd"}, 0.97),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_a_budget_knows_that_codes_are_packed(
    demo: Source, settings: dict[str, Any], least: float, tmp_path: Path
) -> None:
    settings = {"bits": 2.7, "quantizer": "rtn", "group_size": 64, **settings}
    text = {} if settings.get("importance") == "zd" else TEXT
    plain = quantize(demo, {**settings, **text}, tmp_path / "plain")
    packed = quantize(demo, {**settings, **TEXT, "pack": "rans"}, tmp_path / "packed")
    assert 2.7 * least < packed["bits_per_weight"] <= 2.7
    assert packed["bits"] > plain["bits"] + 0.03, "wider codes in the same bytes"
    if plain["predicted_loss_increase"] is not None:
        assert packed["predicted_loss_increase"] < plain["predicted_loss_increase"]


def test_packed_codes_are_distilled(block: Path, demo_block: Source, tmp_path: Path) -> None:
    quantize(demo_block, {"method": "rtn", "bits": 2, "pack": "rans"}, tmp_path / "in")
    options = {
        "calibration": "demo",
        "steps": 6,
        "samples": 8,
        "seq_len": 48,
        "held_back": 3,
        "train": "scales,codes",
        "lr": 2e-3,
    }
    summary = distill(str(tmp_path / "in"), str(block), make_distillation(options), tmp_path / "out", device="cpu")
    assert summary["kl_after"] < summary["kl_before"]
    assert command("check", tmp_path / "out", "--target", "native")[0] == 0


def test_packed_codes_are_unpacked_for_others(demo_block: Source, tmp_path: Path) -> None:
    quantize(demo_block, {"method": "rtn", "bits": 3, "pack": "rans"}, tmp_path / "in")
    export(str(tmp_path / "in"), "compressed-tensors", tmp_path / "out")
    assert torch.equal(weight_of(tmp_path / "in", LINEAR), weight_of(tmp_path / "out", LINEAR))


def test_a_coded_part_is_never_kept_coded_in_memory(coded: Path) -> None:
    checkpoint = open_checkpoint(coded)
    assert not any(
        isinstance(part, Coded) for e in read_entries(checkpoint).values() for part in read_parts(checkpoint, e)
    )
