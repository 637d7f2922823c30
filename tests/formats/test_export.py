"""Exports: the same codes and scales in another format; a part that would be lost is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import command, refused
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmsqueeze
from llmsqueeze import parts
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.distillation.distill import distill
from llmsqueeze.distillation.settings import make_distillation
from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.formats import compressed_tensors
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.formats.export import export
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.parts import Affine, Grid, bitpack
from llmsqueeze.publish.card import model_card
from llmsqueeze.publish.show import contents
from llmsqueeze.recipe.resolve import make_recipe

pytest.importorskip("compressed_tensors")

Exported = Callable[..., tuple[Path, dict[str, Any]]]
Compressed = Callable[[str], Path]


@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width_is_unpacked_by_the_library_as_by_us(bits: int, size: int, generator: torch.Generator) -> None:
    """compressed-tensors' own unpacking of our bytes, with scales of either sign."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    grid = Grid(bits, size, symmetric=True)
    codes = torch.randint(0, grid.max_code + 1, (6, 96), generator=generator).to(torch.uint8)
    scale = torch.randn(6, grid.groups(96), generator=generator)
    part = Affine.from_codes(codes, scale, torch.zeros_like(scale), grid)
    stored = compressed_tensors.stored_tensors("x", [part])
    assert set(stored) == {"x.weight_packed", "x.weight_scale", "x.weight_shape"}
    assert stored["x.weight_shape"].tolist() == [6, 96]
    assert stored["x.weight_packed"].shape == (6, bitpack.words(96, bits))
    signed = unpack_from_int32(stored["x.weight_packed"], bits, torch.Size([6, 96]))
    assert torch.equal(signed.int() + 2 ** (bits - 1), codes.int())
    width = grid.width(96)
    assert torch.equal(part.dense(), signed.float() * scale.repeat_interleave(width, dim=1))


@pytest.mark.parametrize(
    ("bits", "golden"),
    [
        (2, "e4e4e4e4e4e4e4e4"),
        (3, "88c6fa88c6fa88c6fa88c6fa"),
        (4, "10325476981032547698103254769810"),
        (5, "20886252a4100c4562942831869021a418838a52"),
    ],
)
def test_golden_bytes(bits: int, golden: str) -> None:
    """Codes 0, 1, 2 ... over one row of 32, as the bytes have to lie in the file."""
    top = {2: 4, 3: 8, 4: 10, 5: 32}[bits]
    codes = (torch.arange(32) % top).to(torch.uint8)[None]
    bit_string = "".join(format(int(code), f"0{bits}b")[::-1] for code in codes[0])
    slow = bytes(int(bit_string[i : i + 8][::-1], 2) for i in range(0, len(bit_string), 8)).hex()
    packed = bitpack.pack(codes, bits).view(torch.uint8).flatten()
    assert bytes(packed.tolist()).hex() == slow
    if bits != 5:
        assert slow == golden


def test_a_folder_of_several_widths_is_not_read_as_if_it_had_one(exported: Exported) -> None:
    """transformers 5.23 reads all but the first width wrongly then, and says nothing."""
    from transformers import CompressedTensorsConfig

    folder, _ = exported("widths", "compressed-tensors")
    with pytest.raises(UnsupportedError, match="CompressedTensorsConfig"):
        llmsqueeze.load(str(folder), quantization_config=CompressedTensorsConfig(dequantize=True))


def test_the_config_names_every_module_and_ignores_the_rest(exported: Exported) -> None:
    config = open_checkpoint(exported("widths", "compressed-tensors")[0]).config["quantization_config"]
    named = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert len(named) == len(set(named)) == 14
    assert not any(name in ("Linear",) or name.startswith("re:") for name in named)
    assert config["ignore"] == ["lm_head"]
    grids = [(g["weights"]["num_bits"], g["weights"]["group_size"]) for g in config["config_groups"].values()]
    assert len(grids) == len(set(grids)), "one group per width and group size"
    assert all(group["weights"]["symmetric"] for group in config["config_groups"].values())


def test_codes_and_scales_are_not_rounded_again(compressed: Compressed, exported: Exported) -> None:
    native, (portable, summary) = compressed("widths"), exported("widths", "compressed-tensors")
    before, after = open_checkpoint(native), open_checkpoint(portable)
    entries = read_entries(after)
    for name, entry in read_entries(before).items():
        ours = parts.sum_of_parts(read_parts(before, entry))
        assert torch.equal(ours, parts.sum_of_parts(read_parts(after, entries[name])))
    kept = [name for name in before.tensors if ".parts." not in name]
    assert kept
    assert all(torch.equal(before.read(name), after.read(name)) for name in kept)
    assert "rerounded" not in summary
    counted = contents(str(native)), contents(str(portable))
    assert counted[1].nbytes == counted[0].nbytes + 16 * 14, "the shapes"
    assert sorted(row.parts for row in counted[1].rows) == sorted(row.parts for row in counted[0].rows)
    record = json.loads((portable / "llmsqueeze.json").read_text())
    assert record["bits_per_weight"] == round(counted[1].bits_per_weight, 6)


def test_portable_writes_what_an_export_would(
    demo_of: Callable[[int], Path], compressed: Compressed, tmp_path: Path
) -> None:
    native = {"method": "rtn", "bits": 4, "group_size": 64, "portable": False}
    quantize(str(demo_of(2)), make_recipe(native), tmp_path / "native")
    export(str(tmp_path / "native"), "compressed-tensors", tmp_path / "exported")
    exported, direct = open_checkpoint(tmp_path / "exported"), open_checkpoint(compressed("portable"))
    assert exported.config == direct.config
    assert set(exported.tensors) == set(direct.tensors)
    assert all(torch.equal(exported.read_raw(name), direct.read_raw(name)) for name in exported.tensors)
    record = json.loads((compressed("portable") / "llmsqueeze.json").read_text())
    assert record["nbytes"] == direct.nbytes == contents(str(compressed("portable"))).nbytes
    assert record["format"] == "compressed-tensors"


def test_the_card_of_a_portable_folder_needs_no_import(compressed: Compressed) -> None:
    assert "import llmsqueeze.hf" in model_card(compressed("native"))
    card = model_card(compressed("portable"))
    assert "import llmsqueeze.hf" not in card
    assert "RANDOM VALUES" not in card
    assert card.index("AutoModelForCausalLM.from_pretrained") < card.index("llmsqueeze.load")
    assert "vllm serve" in card


def test_a_portable_folder_stays_portable_when_it_is_distilled(
    demo_of: Callable[[int], Path], tokens: Tensor, tmp_path: Path
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    quantize(str(demo_of(1)), make_recipe({"method": "rtn", "bits": 2, "portable": True}), source)
    settings = {"steps": 4, "samples": 8, "held_back": 2, "batch_size": 2, "seq_len": 32, "calibration": "demo"}
    summary = distill(str(source), str(demo_of(1)), make_distillation(settings), out)
    assert summary["best_step"] > 0
    assert summary["kl_after"] < summary["kl_before"]
    before, after = open_checkpoint(source), open_checkpoint(out)
    assert after.config == before.config
    described = [{n: (t.shape, t.dtype) for n, t in one.tensors.items()} for one in (before, after)]
    assert described[0] == described[1]
    changed = {name for name in before.tensors if not torch.equal(before.read_raw(name), after.read_raw(name))}
    assert changed
    assert all(name.endswith((".weight_scale", "norm.weight")) for name in changed), "shapes and codes stay"
    with torch.no_grad():
        ours = llmsqueeze.load(str(out), dtype=torch.float32)(input_ids=tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=tokens).logits
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert make_recipe({"bits": 3, "portable": True, "distill_steps": 5}).portable, "nor do they contradict"


@pytest.mark.parametrize("kind", ["native", "dual", "outliers", "adaptable"])
def test_dense_is_the_sum_of_the_parts(kind: str, compressed: Compressed, adaptable: Path, exported: Exported) -> None:
    folder = adaptable if kind == "adaptable" else compressed(kind)
    checkpoint, before = open_checkpoint(exported(kind, "dense", dtype="fp32")[0]), open_checkpoint(folder)
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.config["dtype"] == "float32"
    for name, entry in read_entries(before).items():
        assert torch.equal(checkpoint.read(f"{name}.weight"), parts.sum_of_parts(read_parts(before, entry)))
    for name in (name for name in before.tensors if ".parts." not in name):
        assert torch.equal(checkpoint.read(name), before.read(name).float())


def test_transposed_weights_are_written_as_their_modules_store_them(
    random_model: Callable[..., Path], tokens: Tensor, tmp_path: Path
) -> None:
    original, recipe = str(random_model("gpt2")), {"method": "rtn", "bits": 4, "group_size": 16}
    quantize(original, make_recipe(recipe), tmp_path / "in")
    export(str(tmp_path / "in"), "dense", tmp_path / "out")
    with torch.no_grad():
        ours = llmsqueeze.load(str(tmp_path / "in"))(input_ids=tokens % 96).logits
        dense = llmsqueeze.load(str(tmp_path / "out"))(input_ids=tokens % 96).logits
    assert torch.allclose(ours, dense, atol=1e-5)
    with pytest.raises(UnsupportedError, match="transposed"):
        export(str(tmp_path / "in"), "compressed-tensors", tmp_path / "portable")
    with pytest.raises(RecipeError, match="transposed"):
        quantize(original, make_recipe({**recipe, "portable": True}), tmp_path / "refused")


@pytest.mark.parametrize(
    ("kind", "what"),
    [("dual", "dual-binary planes"), ("outliers", "outliers"), ("factors", "a low-rank part"), ("rows", "rows on")],
)
def test_what_would_be_lost_is_named(kind: str, what: str, compressed: Compressed, tmp_path: Path) -> None:
    folder = str(compressed(kind))
    with pytest.raises(UnsupportedError, match=rf"in {folder} holds {what}.*, which compressed-tensors cannot"):
        export(folder, "compressed-tensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("grid", "cols", "what"),
    [
        (Grid(2, 32, symmetric=True, half=True), 96, "half-integer levels"),
        (Grid(3, 32, symmetric=False), 96, "zeros (transformers does not open asymmetric ones)"),
        (Grid(3, 64, symmetric=True), 96, "a short last group (96 columns in groups of 64)"),
        (Grid(3, 96, symmetric=True), 96, None),
        (Grid(3, -1, symmetric=True), 100, None),
    ],
)
def test_grids_that_compressed_tensors_cannot_represent(grid: Grid, cols: int, what: str | None) -> None:
    assert compressed_tensors.lost((8, cols), [parts.grid_spec(grid, torch.bfloat16)]) == what


def test_wrong_requests_are_refused(compressed: Compressed, demo_dir: Path, tmp_path: Path) -> None:
    native = str(compressed("native"))
    with pytest.raises(RecipeError, match="unknown --to 'dens'; did you mean 'dense'"):
        export(native, "dens", tmp_path / "out")
    with pytest.raises(RecipeError, match="--dtype bf16 applies to --to dense and --to peft"):
        export(native, "compressed-tensors", tmp_path / "out", dtype="bf16")
    with pytest.raises(RecipeError, match="--dtype bf16 applies to --to dense and --to peft"):
        export(native, "gguf-map", tmp_path / "out", dtype="bf16")
    with pytest.raises(UnsupportedError, match="was not compressed by llmsqueeze"):
        export(str(demo_dir), "dense", tmp_path / "out")
    with pytest.raises(RecipeError, match="is no folder"):
        export(str(tmp_path / "nowhere"), "dense", tmp_path / "out")


def test_the_command(compressed: Compressed, tmp_path: Path) -> None:
    arguments = ["export", compressed("native"), "--to", "dense", "--out", tmp_path / "out", "-q"]
    code, stdout, stderr = command(*arguments, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["target"] == "dense"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "exists already" in refused(*arguments)
