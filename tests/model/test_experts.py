"""Mixtures of experts: every expert's matrix is a linear, whatever the file and the module look like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mixtures import MIXTURES, logits
from safetensors.torch import load_file, save_file
from support import FAST, command, refused, tensors_of
from torch import Tensor

import llmsqueeze
from llmsqueeze import parts
from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.model.blockwise.walk import _linear_hook
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.experts.find import routers, stack_experts
from llmsqueeze.model.experts.stack import ExpertStack
from llmsqueeze.model.skeleton import build_skeleton


@pytest.mark.parametrize("name", MIXTURES)
def test_stacked_experts_compute_what_the_parameter_does(
    name: str, mixture: Callable[[str], tuple[Path, torch.nn.Module]]
) -> None:
    folder, model = mixture(name)
    skeleton = build_skeleton(open_checkpoint(folder))
    with skeleton.resident(skeleton.sources, torch.float32, torch.device("cpu")):
        assert torch.allclose(logits(skeleton.model), logits(model), atol=1e-4)
    stacks = [module for module in skeleton.model.modules() if isinstance(module, ExpertStack)]
    assert stacks
    inside = sum(p.numel() for p in model.parameters() if p.dim() == 3) or 2 * 3 * 4 * 64 * 64
    assert sum(len(stack) * stack.linear(0).weight.numel() for stack in stacks) == inside


@pytest.mark.parametrize("name", MIXTURES)
def test_a_compressed_mixture_opens_with_the_right_logits(
    name: str, mixture: Callable[[str], tuple[Path, torch.nn.Module]], tmp_path: Path
) -> None:
    folder, model = mixture(name)
    flags = ("--method", "rtn", "--bits", 8, "--group-size", 32, "--native")
    code, _, err = command("quantize", folder, *flags, "--out", tmp_path / "out")
    assert code == 0, err
    expected, opened = logits(model), llmsqueeze.load(str(tmp_path / "out"), dtype=torch.float32)
    assert torch.corrcoef(torch.stack([expected.flatten(), logits(opened).flatten()]))[0, 1] > 0.99
    compressed = logits(opened)
    assert command("export", tmp_path / "out", "--to", "dense", "--out", tmp_path / "dense")[0] == 0
    dense = llmsqueeze.load(str(tmp_path / "dense"), dtype=torch.float32)
    assert torch.allclose(logits(dense), compressed, atol=1e-4)
    assert torch.allclose(logits(opened.dequantize()), compressed, atol=1e-4)
    assert not any(isinstance(module, ExpertStack) for module in opened.modules())


def test_files_with_experts_one_by_one_and_fused_give_the_same_codes(
    mixture: Callable[[str], tuple[Path, torch.nn.Module]], tmp_path: Path
) -> None:
    folder, model = mixture("mixtral")
    fused = tmp_path / "fused"
    fused.mkdir()
    for file in folder.iterdir():
        (fused / file.name).write_bytes(file.read_bytes())
    save_file({name: p.contiguous() for name, p in model.state_dict().items()}, fused / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(fused / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in load_file(folder / "model.safetensors")
    for path, out in ((folder, tmp_path / "a"), (fused, tmp_path / "b")):
        code, _, err = command("quantize", path, "--method", "rtn", "--bits", 3, "--native", "--out", out)
        assert code == 0, err
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum("experts" in name for name in first) == 2 * 2 * 4 * 2  # codes and scales


def test_routers_stay_dense(mixture: Callable[[str], tuple[Path, torch.nn.Module]]) -> None:
    skeleton = build_skeleton(open_checkpoint(mixture("jetmoe")[0]))
    found = routers(skeleton.model, skeleton.blocks[0])
    prefix = skeleton.blocks[0]
    assert found == {f"{prefix}.mlp.router.layer", f"{prefix}.self_attention.experts.router.layer"}
    assert not found & set(skeleton.linears[0])


@pytest.mark.parametrize("change", ["lost", "more", "other"])
def test_experts_that_do_not_fit_the_config_are_named(
    change: str, mixture: Callable[[str], tuple[Path, torch.nn.Module]], tmp_path: Path
) -> None:
    folder, _ = mixture("mixtral")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    if change == "lost":
        del tensors[name]
    elif change == "more":
        tensors[name.replace("experts.3", "experts.4")] = tensors[name].clone()
    else:
        tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    message = refused("quantize", tmp_path, "--method", "rtn", "--bits", 4, "--out", tmp_path / "out")
    assert "model.layers.1.mlp.experts.down_proj" in message
    assert "model.layers.1.block_sparse_moe.experts.0.w2.weight" in message


def test_all_experts_see_every_token_if_asked(
    mixture: Callable[[str], tuple[Path, torch.nn.Module]], tmp_path: Path
) -> None:
    folder, _ = mixture("mixtral")
    flags = ("--method", "gptq", "--bits", 3, "--native", *FAST, "--calibration", "demo", "--json", "-q")
    counts, tokens = [], []
    for out, more in ((tmp_path / "a", ()), (tmp_path / "b", ("--all-experts",))):
        code, printed, err = command("quantize", folder, *flags, *more, "--out", out)
        assert code == 0, err
        counts.append(json.loads(printed)["experts"])
        tokens.append(json.loads((out / "llmsqueeze.json").read_text())["tokens"])
    assert counts[0] == {"matrices": 16, "few": 16, "none": 0}
    assert sum(tokens[0].values()) == 4 * 2 * 2 * 32  # matrices of a token's path, its experts, samples
    assert set(tokens[1].values()) == {2 * 32}
    refusal = refused("quantize", mixture("jetmoe")[0], *flags[:-2], "--all-experts", "--out", tmp_path / "c")
    assert "--all-experts needs a model whose experts get the numbers" in refusal


class Grouped(torch.nn.Linear):
    """Rows that belong to groups of inputs: [..., groups, cols] -> [..., groups, rows / groups]."""

    groups = 0

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gc,grc->...gr", x, self.weight.view(self.groups, -1, x.shape[-1]))


def grouped() -> tuple[Grouped, Tensor]:
    torch.manual_seed(0)
    module = Grouped(8, 12, bias=False)
    module.groups = 3
    return module, torch.randn(5, 3, 8)


def test_a_linear_with_a_forward_of_its_own_keeps_it_when_it_is_compressed() -> None:
    module, x = grouped()
    layer = SumOfParts((12, 8), [parts.lowrank_spec(8, torch.float32)], bias=False, transposed=False)
    for buffer in layer.buffers():
        buffer.copy_(torch.randn(buffer.shape) * 40)
    layer.compute_as(module)
    module.weight.data = layer.dense()
    linear = layer.as_linear(torch.float32)
    assert type(linear) is Grouped
    for one in (layer, linear):
        assert torch.allclose(one(x), module(x), atol=1e-5)


def test_the_gradient_at_rows_in_groups_is_told_for_every_row() -> None:
    module, x = grouped()
    seen: list[Tensor] = []
    module.register_forward_hook(_linear_hook("grouped", 12, lambda _name, _x, gradient: seen.append(gradient)))
    weights = torch.randn(5, 3, 4)
    (module(x) * weights).sum().backward()
    assert torch.equal(seen[0], weights.reshape(5, 12))


def test_a_router_with_several_rows_for_every_expert_holds_no_experts() -> None:
    class Router(torch.nn.Module):
        num_experts: int

    router = Router()
    router.num_experts = 4
    router.weight = torch.nn.Parameter(torch.randn(8, 64))
    model = torch.nn.ModuleDict({"router": router})
    model.config = torch.nn.Module()  # type: ignore[assignment]
    assert stack_experts(model, ["router"]) == {}
