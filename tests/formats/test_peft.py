"""Exports to peft: a LoRA adapter beside a portable base."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import command, refused
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.errors import UnsupportedError, VerificationError
from llmsqueeze.formats import export as exporting
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.formats.export import export
from llmsqueeze.formats.exports import peft
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.parts import LowRank
from llmsqueeze.recipe.resolve import make_recipe

LORC = {"method": "rtn", "bits": 3, "group_size": 64, "lorc_rank": 2, "lorc": "plain"}
Exported = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def adapted(exported: Exported) -> tuple[Path, dict[str, Any]]:
    return exported("adaptable", "peft")


@pytest.fixture(scope="module")
def factors(adaptable: Path) -> dict[str, LowRank]:
    """linear -> its low-rank part, from the compressed folder."""
    checkpoint = open_checkpoint(adaptable)
    entries = read_entries(checkpoint).items()
    weights = {name: read_parts(checkpoint, entry) for name, entry in entries}
    return {name: part for name, weight in weights.items() for part in weight if isinstance(part, LowRank)}


def adapter_of(out: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    return config, load_file(out / "adapter" / "adapter_model.safetensors")


def empty(folder: Path) -> bool:
    return list(folder.iterdir()) == []


def test_the_adapters_products_are_the_factors(
    adapted: tuple[Path, dict[str, Any]], factors: dict[str, LowRank]
) -> None:
    """Filled up with zeros to one rank; linears without factors, planned so or dropped, are no targets."""
    out, summary = adapted
    assert {len(part.scale) for part in factors.values()} == set(range(1, 11)), "of many ranks"
    assert not any(name.endswith(("v_proj", "k_proj")) for name in factors)
    config, tensors = adapter_of(out)
    assert sorted(config["target_modules"]) == sorted(factors)
    assert config["r"] == config["lora_alpha"] == summary["rank"] == 16
    assert config["base_model_name_or_path"] == f"{out.name}/base"
    assert summary["adapted"] == len(factors) == 10
    prefix = "base_model.model."
    named = {f"{prefix}{name}.lora_{side}.weight" for name in factors for side in "AB"}
    assert set(tensors) == named
    for name, part in factors.items():
        a, b = (tensors[f"{prefix}{name}.lora_{side}.weight"] for side in "AB")
        rows, cols = part.left.shape[0], part.right.shape[1]
        assert (a.shape, b.shape) == ((16, cols), (rows, 16))
        assert a.dtype == b.dtype == torch.float32
        rank = len(part.scale)
        assert not a[rank:].any()
        assert not b[:, rank:].any()
        # column by column, from the 8-bit codes
        slow = torch.zeros(rows, cols, dtype=torch.float64)
        for k in range(rank):
            scale = float(part.scale[k]) / 127**2
            slow += torch.outer(part.left[:, k].double(), part.right[k].double()) * scale
        assert torch.allclose(b.double() @ a.double(), slow, rtol=0, atol=1e-6 * float(slow.abs().max()))
    assert summary["adapter_nbytes"] == sum(tensor.nbytes for tensor in tensors.values())
    base = open_checkpoint(out / "base")
    assert summary["nbytes"] == base.nbytes + summary["adapter_nbytes"]
    assert json.loads((out / "llmsqueeze.json").read_text())["format"] == "peft"


def test_the_base_holds_everything_else(adaptable: Path, adapted: tuple[Path, dict[str, Any]]) -> None:
    out, summary = adapted
    assert {path.name for path in out.iterdir()} == {"base", "adapter", "llmsqueeze.json"}
    assert not any(summary["opens"].values()), "the base opens everywhere"
    before, after = open_checkpoint(adaptable), open_checkpoint(out / "base")
    assert after.config["quantization_config"]["quant_method"] == "compressed-tensors"
    entries = read_entries(after)
    for name, entry in read_entries(before).items():
        without = [part for part in read_parts(before, entry) if not isinstance(part, LowRank)]
        assert torch.equal(parts.sum_of_parts(without), parts.sum_of_parts(read_parts(after, entries[name])))
    kept = [name for name in before.tensors if ".parts." not in name]
    assert all(torch.equal(before.read(name), after.read(name)) for name in kept)


def test_adapters_in_half_the_bytes(adapted: tuple[Path, dict[str, Any]], exported: Exported) -> None:
    out, summary = exported("adaptable", "peft", dtype="bf16")
    whole, half = adapter_of(adapted[0])[1], adapter_of(out)[1]
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert summary["adapter_nbytes"] * 2 == adapted[1]["adapter_nbytes"]


@pytest.mark.parametrize(
    ("rank", "padded"),
    [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 128), (128, 128)],
)
def test_ranks_are_those_that_servers_accept(rank: int, padded: int) -> None:
    assert peft.adapter_rank({"small": 1, "large": rank}) == padded
    factors = LowRank(
        torch.randint(-9, 9, (6, rank), dtype=torch.int8),
        torch.randint(-9, 9, (rank, 5), dtype=torch.int8),
        torch.rand(rank).bfloat16(),
    )
    tensors = peft.adapter_tensors("x", factors, padded, torch.float32)
    a, b = (tensors[f"base_model.model.x.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((padded, 5), (6, padded))
    assert torch.allclose(b @ a, factors.dense(), rtol=1e-4, atol=1e-6)


def test_a_rank_above_what_servers_accept_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="the factors of big have rank 129; servers accept"):
        peft.adapter_rank({"small": 1, "big": 129})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("native", "holds no low-rank parts, so there is nothing to adapt"),
        ("both", "holds outliers, which compressed-tensors cannot represent"),
    ],
)
def test_a_folder_that_cannot_be_adapted_is_refused(
    kind: str, message: str, compressed: Callable[[str], Path], demo_of: Callable[[int], Path], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    folder = tmp_path / "in" if kind == "both" else compressed(kind)
    if kind == "both":
        recipe = {**LORC, "method": "gwq", "quantizer": "rtn", "outlier_ranking": "magnitude"}
        quantize(str(demo_of(1)), make_recipe(recipe), folder, verify=False)
    with pytest.raises(UnsupportedError, match=message) as refusal:
        export(str(folder), "peft", tmp_path / "there" / "out")
    assert str(folder) in str(refusal.value)
    assert empty(tmp_path / "there"), "nothing is left behind"


def test_an_interrupted_export_leaves_nothing(adaptable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting.peft, "adapter_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(str(adaptable), "peft", tmp_path / "out")
    assert empty(tmp_path)


@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_a_corrupt_adapter_is_found(
    damage: str, adaptable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the disk had not kept what was written; then it does not get its name."""
    spoilt = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def spoils(file: Path, tensors: dict[str, Tensor]) -> None:
        stored = {name: tensor.clone() for name, tensor in tensors.items()}
        if damage == "lost":
            stored.pop(spoilt, None)
        elif spoilt in stored:
            stored[spoilt].view(-1).view(torch.int32)[5] ^= 1
        write(file, stored)

    write = exporting.shard.write
    monkeypatch.setattr(exporting.shard, "write", spoils)
    with pytest.raises(VerificationError, match=re.escape(spoilt)):
        export(str(adaptable), "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_to_serve_it(adaptable: Path, tmp_path: Path) -> None:
    out = tmp_path / "my out"
    arguments = ["export", adaptable, "--to", "peft", "--dtype", "bf16", "--out", out, "-q"]
    code, stdout, stderr = command(*arguments, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["command"] == (
        f"vllm serve '{out}/base' --enable-lora --max-lora-rank 16 --lora-modules 'lorc={out}/adapter'"
    )
    assert "exists already" in refused(*arguments)
    assert command(*arguments, "--overwrite")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["my out"]
