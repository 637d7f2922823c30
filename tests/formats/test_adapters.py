"""LoRA adapters: trained on compressed models by PEFT, and merged into weights before and after compression."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import FAST, command, refused
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmsqueeze
from llmsqueeze.errors import CheckpointError, UnsupportedError
from llmsqueeze.formats.export import export
from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.model.adapter import changes
from llmsqueeze.model.original import Source, open_original

TEXT = torch.randint(3, 200, (4, 24), generator=torch.Generator().manual_seed(0))
KINDS = ["native", "portable", "coded"]


def adapted(model: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    return peft.get_peft_model(model, peft.LoraConfig(**settings | options))


def disturbed(model: Any, seed: int = 0) -> Any:
    """The adapter with random factors: a new one changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def base(demo_of: Callable[[int], Path]) -> Path:
    return demo_of(2)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the demo, with ranks and scales that differ."""
    out = tmp_path_factory.mktemp("adapter") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    disturbed(adapted(model, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3})).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The slow twin: the whole model in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return dict(peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


def trained(model: Any) -> list[float]:
    """The losses of 20 steps on the same text."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=TEXT, labels=TEXT).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_on_a_compressed_model(
    kind: str, compressed: Callable[[str], Path], tmp_path: Path
) -> None:
    """20 steps lower the loss as they do on the dense model; the adapter is saved, loaded again, merged by `export`."""
    folder = compressed(kind)

    def opened() -> Any:
        torch.manual_seed(0)
        return llmsqueeze.load(str(folder), dtype=torch.float32, keep_codes=True)

    model = adapted(opened(), r=8, target_modules="all-linear")
    assert sum(isinstance(module, SumOfParts) for module in model.modules()) == 14
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.05
    assert losses == pytest.approx(trained(adapted(opened().dequantize(), r=8, target_modules="all-linear")), abs=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=TEXT).logits
        again = peft.PeftModel.from_pretrained(
            llmsqueeze.load(str(folder), dtype=torch.float32), str(tmp_path / "adapter")
        )
        assert torch.allclose(again(input_ids=TEXT).logits, expected, atol=1e-4)
        out = tmp_path / "dense"
        export(str(folder), "dense", out, dtype="fp32", adapter=str(tmp_path / "adapter"))
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.allclose(merged(input_ids=TEXT).logits, expected, atol=1e-3)


def test_the_gradient_is_that_of_the_dense_layer(compressed: Callable[[str], Path]) -> None:
    model = llmsqueeze.load(str(compressed("outliers")), dtype=torch.float32)
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    dense = layer.as_linear(torch.float32)
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    gradients = []
    for one in (layer, dense):
        y = one(x)
        gradients.append(torch.autograd.grad((y * torch.arange(y.shape[-1])).sum(), x)[0])
    assert torch.equal(*gradients)


def test_merging_in_memory_is_refused_not_lost(compressed: Callable[[str], Path]) -> None:
    """A compressed weight is computed at every use: what PEFT writes into it would be gone."""
    model = adapted(llmsqueeze.load(str(compressed("native"))))
    for safe in (False, True):
        with pytest.raises(UnsupportedError, match="--to dense --adapter ADAPTER, or"):
            model.merge_and_unload(safe_merge=safe)
    dense = adapted(llmsqueeze.load(str(compressed("native"))).dequantize()).merge_and_unload()
    assert type(dense.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_weights_with_an_adapter_are_those_of_peft(
    base: Path, adapter: Path, merged_by_peft: dict[str, Tensor]
) -> None:
    """Read one by one, they are its sums in float32, in the dtype of the file."""
    original = open_original(Source(str(base), adapter=str(adapter)))
    read = {name: original.skeleton.read(name) for name in original.skeleton.sources}
    assert len(changes(base, adapter)) == 4
    for name, tensor in read.items():
        assert torch.equal(tensor, merged_by_peft[name].to(tensor.dtype)), name
    plain = open_original(Source(str(base))).skeleton
    assert {name for name in read if not torch.equal(read[name], plain.read(name))} == set(changes(base, adapter))


def test_the_command_compresses_the_merged_model(
    base: Path, adapter: Path, merged_by_peft: dict[str, Tensor], tmp_path: Path
) -> None:
    """With the adapter named, or in the model's own folder; it is never copied into the result."""
    options = ["--method", "rtn", "--bits", 8, "--group-size", 64]
    own = Path(shutil.copytree(base, tmp_path / "own"))
    for file in adapter.iterdir():
        shutil.copy(file, own / file.name)
    for name, given in {"a": [base, "--adapter", adapter], "b": [own, "--merge-adapter"]}.items():
        code, _, stderr = command("quantize", *given, *options, "--out", tmp_path / name)
        assert code == 0, stderr
        assert not list((tmp_path / name).glob("adapter*"))
        weights = llmsqueeze.load(str(tmp_path / name), dtype=torch.float32).dequantize().state_dict()
        for linear, tensor in merged_by_peft.items():
            assert (weights[linear] - tensor).norm() < 0.02 * tensor.norm(), linear
    records = [json.loads((tmp_path / name / "llmsqueeze.json").read_text()) for name in "ab"]
    assert [record["adapter"] for record in records] == ["adapter", "its own"]
    short = ["--steps", 1, "--samples", 4, "--seq-len", 16, "--held-back", 2, "--out", tmp_path / "d"]
    message = refused("distill", tmp_path / "a", "--teacher", base, *short)
    assert "with a LoRA adapter (adapter) merged: name the adapter with --adapter" in message
    code, stdout, stderr = command("distill", tmp_path / "a", "--teacher", base, "--adapter", adapter, *short, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["kl_before"] < 0.001, "far less than the adapter changes"
    twice = ["--adapter", adapter, f"--adapter={adapter}"]
    assert "--adapter is given several times; one is merged at a time" in refused("quantize", base, *options, *twice)
    assert "has an adapter of its own" in refused("quantize", own, *options, "--adapter", adapter)
    message = refused("quantize", own, *options, "--out", tmp_path / "c")
    assert "holds a LoRA adapter (adapter_config.json): --merge-adapter merges it" in message
    more = ["--distill-steps", 2, "--calibration", "demo", *FAST]
    code, _, stderr = command("quantize", base, *options, "--adapter", adapter, *more, "--out", tmp_path / "distilled")
    assert code == 0, stderr
    message = refused("quantize", base, *options, "--merge-adapter", "--out", tmp_path / "c")
    assert "there is no adapter_config.json" in message


def spoiled(adapter: Path, out: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """A copy of the adapter with another config or other tensors."""
    shutil.copytree(adapter, out)
    config, tensors = (
        json.loads((out / "adapter_config.json").read_text()),
        load_file(out / "adapter_model.safetensors"),
    )
    change(config, tensors)
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(peft_type="IA3"), "of the kind IA3; only LORA"),
        (lambda c, t: c.update(use_dora=True), "no plain LoRA; merge it with PEFT|is no adapter for"),
        (lambda c, t: t.update({"base_model.model.nothing.weight": torch.ones(2)}), "more than the factors of linears"),
        (lambda c, t: c.update(target_modules=["nothing"]), "is no adapter for"),
        (lambda c, t: t.update({name: tensor[:, :5].contiguous() for name, tensor in t.items()}), "is no adapter for"),
    ],
)
def test_adapters_that_cannot_be_merged(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None], message: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises((UnsupportedError, CheckpointError), match=message):
        changes(base, spoiled(adapter, tmp_path / "spoiled", change))


def test_what_is_no_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no adapter"):
        changes(base, base)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="read from safetensors alone"):
        changes(base, tmp_path)
    assert "is a LoRA adapter and no model" in refused("quantize", adapter, "--out", tmp_path / "out")
