"""What was written is read back: one wrong byte, between writing and verifying, keeps the result from its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from llmsqueeze import parts
from llmsqueeze.cli.app import app
from llmsqueeze.compress import blocks, weight
from llmsqueeze.errors import VerificationError
from llmsqueeze.formats import export
from llmsqueeze.formats import verify as verification
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.formats.folder import Output, digest
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.recipe.bundled import make_recipe

QUICK = {"method": "rtn", "bits": 3}
RECIPES: dict[str, dict[str, Any]] = {
    "portable": {**QUICK, "group_size": 64},
    "native": {**QUICK, "portable": False},
    "outliers": {"method": "gwq", "quantizer": "rtn", "bits": 3, "outlier_ranking": "magnitude"},
    "dual": {"method": "dbllm", "quantizer": "rtn"},
    "rows": {"method": "mixllm", "quantizer": "rtn", "importance": "random"},
    "factors": {**QUICK, "lorc_rank": 2, "lorc": "plain"},
}
LINEAR = "model.layers.2.mlp.up_proj"


def between(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """`damage` is done to the folder when all is written and nothing is verified."""
    verify = blocks.verification.verify

    def damaged(output: Output, *rest: Any) -> Any:
        damage(output.partial)
        return verify(output, *rest)

    monkeypatch.setattr(blocks.verification, "verify", damaged)


def place_of(folder: Path, name: str) -> tuple[Path, int, int]:
    """The file of a tensor, and where in it its bytes begin and end."""
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return file, 8 + length + begin, 8 + length + end


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 0x10
    file.write_bytes(bytes(raw))


def flips(name: str, share: float) -> Callable[[Path], None]:
    """One byte of a tensor, at that share of its length, changes."""

    def damage(folder: Path) -> None:
        file, begin, end = place_of(folder, name)
        flip(file, begin + int(share * (end - begin - 1)))

    return damage


@pytest.mark.parametrize("name", RECIPES)
def test_all_is_read_back_and_equal(name: str, tmp_path: Path) -> None:
    made = blocks.quantize("demo", make_recipe(RECIPES[name]), tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert made.verified == {
        "tensors": len(checkpoint.tensors),
        "weights": len(read_entries(checkpoint)),
        "blocks": 4,
        "largest_difference": 0.0,
    }
    assert made.opens["native"] == ""
    assert (made.opens["transformers"] == "") is (made.format == "compressed-tensors")


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("recipe", "tensor"),
    [
        ("portable", f"{LINEAR}.weight_packed"),
        ("portable", f"{LINEAR}.weight_scale"),
        ("portable", f"{LINEAR}.weight_shape"),
        ("portable", "model.layers.3.input_layernorm.weight"),
        ("portable", "model.embed_tokens.weight"),
        ("outliers", f"{LINEAR}.parts.1.index"),
        ("dual", f"{LINEAR}.parts.0.plane2"),
        ("rows", f"{LINEAR}.parts.0.rows"),
        ("factors", f"{LINEAR}.parts.1.left"),
    ],
)
def test_one_wrong_byte_is_found_and_named(
    recipe: str, tensor: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    between(monkeypatch, flips(tensor, share))
    with pytest.raises(VerificationError, match=tensor.replace(".", r"\.")):
        blocks.quantize("demo", make_recipe(RECIPES[recipe]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert (tmp_path / "out.partial" / "config.json").exists()


def test_a_damaged_header_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(folder: Path) -> None:
        flip(place_of(folder, f"{LINEAR}.weight_packed")[0], 20)

    between(monkeypatch, damage)
    with pytest.raises(VerificationError, match=r"cannot be read back|but not both"):
        blocks.quantize("demo", make_recipe(RECIPES["portable"]), tmp_path / "out")
    assert (tmp_path / "out.partial").is_dir()


def edits_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def rope(config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_theta"] *= 7


def zeros(config: dict[str, Any]) -> None:
    config["quantization_config"]["weights"][LINEAR]["parts"][0]["symmetric"] = False


def drop(config: dict[str, Any]) -> None:
    del config["quantization_config"]["weights"][LINEAR]


def half(config: dict[str, Any]) -> None:
    config["quantization_config"]["weights"][LINEAR]["parts"][0]["half"] = True


@pytest.mark.parametrize(
    ("change", "words"),
    [(rope, "output of model.layers.0"), (drop, LINEAR), (half, f"{LINEAR}, put together"), (zeros, r"lacks .*\.zero")],
)
def test_a_config_that_says_something_else_is_found(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    between(monkeypatch, edits_config(change))
    with pytest.raises(VerificationError, match=words):
        blocks.quantize("demo", make_recipe(RECIPES["native"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_change_places_are_found_by_their_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are all there and sound, only under each other's names: as a wrong map of names would write them."""
    stored = blocks.compressed_tensors.stored_tensors

    def swapped(linear: str, weight_parts: Any) -> dict[str, Tensor]:
        other = {"q_proj": "o_proj", "o_proj": "q_proj"}
        head, _, leaf = linear.rpartition(".")
        return stored(f"{head}.{other.get(leaf, leaf)}", weight_parts)

    monkeypatch.setattr(blocks.compressed_tensors, "stored_tensors", swapped)
    with pytest.raises(VerificationError, match=r"layers\.0\.self_attn\.[qo]_proj, put together from the file"):
        blocks.quantize("demo", make_recipe(RECIPES["portable"]), tmp_path / "out")


def test_codes_that_are_packed_wrongly_are_found_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = parts.affine.bitpack.pack
    monkeypatch.setattr(parts.affine.bitpack, "pack", lambda codes, bits: pack(codes.clamp(max=5), bits))
    with pytest.raises(VerificationError, match=r"model\.layers\.0\.\S+: the packed codes on 3 bit"):
        blocks.quantize("demo", make_recipe(RECIPES["portable"]), tmp_path / "out")
    assert weight.VerificationError is VerificationError


def test_without_verification_the_check_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is to be verified")

    monkeypatch.setattr(blocks.verification, "verify", refuse)
    made = blocks.quantize("demo", make_recipe(RECIPES["portable"]), tmp_path / "out", verify=False)
    assert made.verified is None
    assert made.opens["transformers"] == ""


def test_what_fails_the_check_does_not_get_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of zero is what was meant, and is wrong all the same."""
    stored = blocks.compressed_tensors.stored_tensors

    def zeroed(linear: str, weight_parts: Any) -> dict[str, Tensor]:
        made = stored(linear, weight_parts)
        return made | {name: t * 0 for name, t in made.items() if name.endswith("weight_scale")}

    monkeypatch.setattr(blocks.compressed_tensors, "stored_tensors", zeroed)
    with pytest.raises(VerificationError, match=r"does not pass the check: .*weight_scale holds zeros"):
        blocks.quantize("demo", make_recipe(RECIPES["portable"]), tmp_path / "out", verify=False)
    assert (tmp_path / "out.partial").is_dir()
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_2_and_the_next_run_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["quantize", "demo", "--method", "rtn", "--bits", "3", "--out", str(tmp_path / "out"), "-q"]
    with monkeypatch.context() as patched:
        between(patched, flips(f"{LINEAR}.weight_packed", 0.5))
        ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 2
    assert f"{LINEAR}.weight_packed" in ended.output
    assert "out.partial" in ended.output
    assert "Traceback" not in ended.output
    assert CliRunner().invoke(app, command).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_is_read_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks.quantize("demo", make_recipe(RECIPES["native"]), tmp_path / "made")
    write = Output.write_shard

    def damaged(self: Output, tensors: dict[str, Tensor]) -> None:
        write(self, tensors)
        name = f"model-{self._written:05d}-of-{self.shards:05d}.safetensors"
        held = load_file(self.partial / name)
        if f"{LINEAR}.weight_scale" in held:
            held[f"{LINEAR}.weight_scale"][3, 0] *= 2
            save_file(held, self.partial / name, {"format": "pt"})

    monkeypatch.setattr(Output, "write_shard", damaged)
    with pytest.raises(VerificationError, match=f"{LINEAR}.weight_scale"):
        export.export(str(tmp_path / "made"), "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_digest_knows_shape_dtype_and_every_bit(generator: torch.Generator) -> None:
    base = torch.randn(6, 4, generator=generator)
    other = base.clone()
    other.view(torch.int32)[5, 3] ^= 1
    assert digest(base) == digest(base.clone())
    different = [base.T, base.reshape(4, 6), base.view(torch.int32), other, base.bfloat16()]
    assert digest(base) not in {digest(tensor) for tensor in different}
    assert digest(torch.tensor(1.0)) != digest(torch.tensor([1.0]))


def test_the_witness_sees_what_transformers_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs that are compared are those of the model with the compressed weights in it."""
    kept: list[verification.Meant] = []
    verify = blocks.verification.verify

    def watched(output: Output, meant: verification.Meant, *rest: Any) -> Any:
        kept.append(meant)
        return verify(output, meant, *rest)

    monkeypatch.setattr(blocks.verification, "verify", watched)
    blocks.quantize("demo", make_recipe(RECIPES["outliers"]), tmp_path / "out")
    from transformers import AutoModelForCausalLM

    from llmsqueeze.demo import MODEL_DIR

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, entry in read_entries(checkpoint).items():
        model.get_submodule(name).weight.data = parts.sum_of_parts(read_parts(checkpoint, entry))
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(kept[0].sample)
    assert kept[0].sample is not None
    assert kept[0].sample.shape == (1, 32)
    for ours, theirs in zip(kept[0].outputs, outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
