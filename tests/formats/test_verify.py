"""A folder is read back: one wrong byte, between writing and verifying, keeps it from its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import KINDS, TEXT, command, thorough
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.compress import pipeline
from llmsqueeze.compress.weights import weight
from llmsqueeze.errors import VerificationError
from llmsqueeze.formats import export
from llmsqueeze.formats import verify as verification
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.formats.folder import Output, digest
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.recipe.resolve import make_recipe

LINEAR = "model.layers.1.mlp.up_proj"


Damage = Callable[[Path], None]


def position(folder: Path, name: str) -> tuple[Path, int, int]:
    """The file of a tensor, and the first byte of it there and the one behind its last."""
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return file, 8 + length + begin, 8 + length + end


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 0x10
    file.write_bytes(bytes(raw))


def flips(name: str, share: float) -> Damage:
    """One byte of a tensor, at that share of its length, changes."""

    def damage(folder: Path) -> None:
        file, begin, end = position(folder, name)
        flip(file, begin + int(share * (end - begin - 1)))

    return damage


@pytest.mark.parametrize(
    ("kind", "tensor", "share"),
    [
        ("portable", f"{LINEAR}.weight_packed", 0.4),
        ("portable", f"{LINEAR}.weight_scale", 0.0),
        ("portable", f"{LINEAR}.weight_shape", 0.0),
        ("portable", f"{LINEAR}.weight_shape", 1.0),
        ("portable", "model.layers.1.input_layernorm.weight", 1.0),
        ("portable", "model.embed_tokens.weight", 0.4),
        ("outliers", f"{LINEAR}.parts.1.index", 1.0),
        thorough("dual", f"{LINEAR}.parts.0.plane2", 0.0),
        thorough("rows", ".parts.0.rows", 0.4),
        thorough("factors", f"{LINEAR}.parts.1.left", 1.0),
        ("coded", f"{LINEAR}.parts.0.words", 0.4),
        thorough("packed", f"{LINEAR}.parts.0.tables", 0.0),
    ],
)
def test_one_wrong_byte_is_found_and_named(
    kind: str, tensor: str, share: float, verified_copy: Callable[..., Any], verifications: dict[str, Any]
) -> None:
    def damage(folder: Path) -> None:
        tensors.extend(name for name in verifications[kind][0] if name.endswith(tensor))
        flips(tensors[-1], share)(folder)

    tensors: list[str] = []
    with pytest.raises(VerificationError, match=r"(\S+) in .* is not what was written") as failure:
        verified_copy(kind, damage)
    assert f"{tensors[-1]} in " in str(failure.value)


def test_a_damaged_header_is_found(verified_copy: Callable[..., Any]) -> None:
    def damage(folder: Path) -> None:
        flip(position(folder, f"{LINEAR}.weight_packed")[0], 20)

    with pytest.raises(VerificationError, match=r"cannot be read back|but not both"):
        verified_copy("portable", damage)


def edits_config(change: Callable[[dict[str, Any]], None]) -> Damage:
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


def fewer(config: dict[str, Any]) -> None:
    config["num_hidden_layers"] = 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rope, r"output of model\.layers\.0"),
        (drop, LINEAR),
        (half, f"{LINEAR}, put together"),
        (zeros, rf"{LINEAR}.*\.zero is missing"),
        (fewer, r"does not pass the check: .*layers\.1"),
    ],
)
def test_a_config_that_says_something_else_is_found(
    change: Callable[[dict[str, Any]], None], words: str, verified_copy: Callable[..., Any]
) -> None:
    with pytest.raises(VerificationError, match=words):
        verified_copy("native", edits_config(change))


def test_swapped_weights_are_found_by_their_weight(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors are all there and sound, only under each other's names: as a wrong map of names would write them."""
    stored = pipeline.compressed_tensors.stored_tensors

    def swapped(linear: str, weight_parts: Any) -> dict[str, Tensor]:
        other = {"q_proj": "o_proj", "o_proj": "q_proj"}
        head, _, leaf = linear.rpartition(".")
        return stored(f"{head}.{other.get(leaf, leaf)}", weight_parts)

    monkeypatch.setattr(pipeline.compressed_tensors, "stored_tensors", swapped)
    with pytest.raises(VerificationError, match=r"layers\.0\.self_attn\.[qo]_proj, put together from the file"):
        pipeline.compress_model(str(demo_of(1)), make_recipe(KINDS["portable"]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert (tmp_path / "out.partial" / "config.json").exists()


def test_codes_that_are_packed_wrongly_are_found_before_they_are_written(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = parts.affine.bitpack.pack
    monkeypatch.setattr(parts.affine.bitpack, "pack", lambda codes, bits: pack(codes.clamp(max=5), bits))
    with pytest.raises(VerificationError, match=r"model\.layers\.0\.\S+: the packed codes on 4 bit"):
        pipeline.compress_model(str(demo_of(1)), make_recipe(KINDS["portable"]), tmp_path / "out")
    assert weight.VerificationError is VerificationError


def test_without_verification_the_check_is_left(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of zero is what was meant, and is wrong all the same: the folder does not get its name."""

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is to be verified")

    monkeypatch.setattr(pipeline.verification, "verify", refuse)
    recipe = make_recipe(KINDS["portable"])
    summary = pipeline.compress_model(str(demo_of(1)), recipe, tmp_path / "sound", verify=False)
    assert summary.verified is None
    assert summary.opens["transformers"] == ""
    stored = pipeline.compressed_tensors.stored_tensors

    def zeroed(linear: str, weight_parts: Any) -> dict[str, Tensor]:
        tensors = stored(linear, weight_parts)
        return tensors | {name: t * 0 for name, t in tensors.items() if name.endswith("weight_scale")}

    monkeypatch.setattr(pipeline.compressed_tensors, "stored_tensors", zeroed)
    with pytest.raises(VerificationError, match=r"does not pass the check: .*weight_scale holds zeros"):
        pipeline.compress_model(str(demo_of(1)), recipe, tmp_path / "out", verify=False)
    assert (tmp_path / "out.partial").is_dir()
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_2_and_the_next_run_begins_anew(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify, linear = verification.verify, "model.layers.0.mlp.up_proj"

    def damaged(output: Output, *rest: Any) -> Any:
        flips(f"{linear}.weight_packed", 0.5)(output.partial)
        return verify(output, *rest)

    run = ["quantize", demo_of(1), "--method", "rtn", "--bits", "3", "--out", tmp_path / "out", "-q"]
    with monkeypatch.context() as patched:
        patched.setattr(pipeline.verification, "verify", damaged)
        code, out, err = command(*run)
    assert code == 2
    assert f"{linear}.weight_packed" in err
    assert "out.partial" in err
    assert "Traceback" not in out + err
    assert command(*run)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_is_read_back_too(
    compressed: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Output.write_shard

    def damaged(self: Output, tensors: dict[str, Tensor]) -> None:
        write(self, tensors)
        self.wait()
        name = f"model-{self._written:05d}-of-{self.shards:05d}.safetensors"
        stored = load_file(self.partial / name)
        if f"{LINEAR}.weight_scale" in stored:
            stored[f"{LINEAR}.weight_scale"][3, 0] *= 2
            save_file(stored, self.partial / name, {"format": "pt"})

    monkeypatch.setattr(Output, "write_shard", damaged)
    with pytest.raises(VerificationError, match=f"{LINEAR}.weight_scale"):
        export.export(str(compressed("native")), "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_digest_knows_shape_dtype_and_every_bit(generator: torch.Generator) -> None:
    base = torch.randn(6, 4, generator=generator)
    other = base.clone()
    other.view(torch.int32)[5, 3] ^= 1
    assert digest(base) == digest(base.clone())
    different = [base.T, base.reshape(4, 6), base.view(torch.int32), other, base.bfloat16()]
    assert digest(base) not in {digest(tensor) for tensor in different}
    assert digest(torch.tensor(1.0)) != digest(torch.tensor([1.0]))


def test_the_witness_sees_what_transformers_computes(
    compressed: Callable[[str], Path], verifications: dict[str, Any], demo_of: Callable[[int], Path]
) -> None:
    """The outputs that are compared are those of the model with the compressed weights in it."""
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(compressed("outliers"))
    model = AutoModelForCausalLM.from_pretrained(demo_of(2), dtype=torch.float32).eval()
    for name, entry in read_entries(checkpoint).items():
        model.get_submodule(name).weight.data = parts.sum_of_parts(read_parts(checkpoint, entry))
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    _, computed = verifications["outliers"]
    sample = computed.sample
    assert sample is not None
    assert sample.shape == (1, min(32, TEXT["seq_len"]))
    with torch.no_grad():
        model(sample)
    for ours, theirs in zip(computed.outputs, outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
