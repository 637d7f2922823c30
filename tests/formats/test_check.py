"""`check` finds every damage by name, and says what opens a folder and why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import KINDS, command
from torch import Tensor

from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.errors import RecipeError
from llmsqueeze.formats.check import check
from llmsqueeze.formats.inspection.integrity import padding_errors
from llmsqueeze.recipe.resolve import make_recipe

LINEAR = "model.layers.0.self_attn.q_proj"
Compressed = Callable[[str], Path]


def damaged(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy with the tensors of the first block changed; the index names what is there then."""
    shutil.copytree(folder, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    file = next(f for name, f in index["weight_map"].items() if name.startswith(LINEAR))
    tensors = load_file(out / file)
    change(tensors)
    save_file(tensors, out / file, {"format": "pt"})
    kept = {name: f for name, f in index["weight_map"].items() if f != file}
    index["weight_map"] = kept | dict.fromkeys(tensors, file)
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def configured(folder: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy with another quantization config."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    change(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    return out


def unsigned(folder: Path) -> None:
    """Removes the checksums of the config, as if it had been written so."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["metadata"] = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_we_write_is_sound(kind: str, compressed: Compressed) -> None:
    result = check(str(compressed(kind)))
    assert result["sound"], result["errors"]
    assert result["errors"] == []
    assert result["verdicts"]["native"] == ""
    portable = kind == "portable"
    assert (result["verdicts"]["transformers"] == "") is portable
    assert (result["verdicts"]["vllm"] == "") is portable
    assert result["format"] == ("compressed-tensors" if portable else "llmsqueeze")


def test_zeros_and_short_groups_are_sound(demo_of: Callable[[int], Path], tmp_path: Path) -> None:
    recipe = {"method": "rtn", "bits": 3, "group_size": 48, "symmetric": False}
    quantize(str(demo_of(1)), make_recipe(recipe), tmp_path / "out")
    result = check(str(tmp_path / "out"))
    assert result["sound"], result["errors"]
    assert "zeros" in result["verdicts"]["vllm"]


def test_a_dense_export_opens_everywhere(exported: Callable[..., tuple[Path, Any]]) -> None:
    folder, summary = exported("dual", "dense", dtype="fp32")
    result = check(str(folder))
    assert result["sound"], result["errors"]
    assert set(result["verdicts"].values()) == {""}
    assert summary["opens"] == result["verdicts"]


def put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = value(tensors[name].clone()).contiguous()

    return change


def first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def mark_all(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith(".parts.0.rows"))
    tensors[name] = torch.full_like(tensors[name], -1)


PART = f"{LINEAR}.parts.0"
DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "a part lost": ("native", drop(f"{PART}.scale"), f"{PART}.scale is missing"),
    "a norm lost": (
        "native",
        drop("model.layers.0.input_layernorm.weight"),
        "model.layers.0.input_layernorm.weight is missing",
    ),
    "something extra": ("native", lambda t: t.update(extra=torch.zeros(3)), "extra is explained by nothing"),
    "another shape": ("native", put(f"{PART}.codes", lambda t: t[:, :-1]), f"{PART}.codes is "),
    "another dtype": ("native", put(f"{PART}.scale", lambda t: t.double()), f"{PART}.scale is "),
    "another norm": (
        "native",
        put("model.layers.0.input_layernorm.weight", lambda t: t[:-1]),
        "model.layers.0.input_layernorm.weight is [",
    ),
    "a norm of NaN": (
        "native",
        put("model.layers.0.input_layernorm.weight", first(float("nan"))),
        "model.layers.0.input_layernorm.weight holds numbers that are not finite",
    ),
    "NaN": ("native", put(f"{PART}.scale", first(float("nan"))), f"{PART}.scale holds numbers that are not finite"),
    "a scale of zero": ("native", put(f"{PART}.scale", first(0.0)), f"{PART}.scale holds zeros"),
    "too many marks": ("rows", mark_all, ".parts.0.rows marks "),
    "crossed alphas": ("dual", put(f"{PART}.alpha2", lambda t: -t), "cross: their levels are not in order"),
    "outliers miscounted": (
        "outliers",
        put(f"{LINEAR}.parts.1.row_count", first(999)),
        f"{LINEAR}.parts.1.row_count counts ",
    ),
    "outliers outside": (
        "outliers",
        put(f"{LINEAR}.parts.1.index", first(5000)),
        f"{LINEAR}.parts.1.index points beyond",
    ),
    "an infinite factor": (
        "factors",
        put(f"{LINEAR}.parts.1.scale", first(float("inf"))),
        f"{LINEAR}.parts.1.scale holds numbers that are not finite",
    ),
    "a wrong shape written": (
        "portable",
        put(f"{LINEAR}.weight_shape", lambda t: t.flip(0) + 1),
        f"{LINEAR}.weight_packed is [128, 16] int32; the config says",
    ),
    "a shape of as many words": (
        "portable",
        put(f"{LINEAR}.weight_shape", lambda t: t - torch.tensor([0, 1])),
        f"{LINEAR} is [128, 127]; the model needs [128, 128]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(damage: str, compressed: Compressed, tmp_path: Path) -> None:
    kind, change, message = DAMAGES[damage]
    result = check(str(damaged(compressed(kind), tmp_path / "out", change)))
    assert not result["sound"]
    assert any(message in error for error in result["errors"]), result["errors"]
    assert all(result["verdicts"].values()), "nothing opens it"


def test_bits_beyond_the_last_column_are_found() -> None:
    clean = torch.zeros(2, 4, dtype=torch.int32)
    clean[:, -1] = 0b111
    assert list(padding_errors("x", clean, 99)) == []
    clean[1, -1] = 0b1000
    assert list(padding_errors("x", clean, 99)) == ["x has bits set beyond its last column"]
    assert list(padding_errors("x", torch.full((2, 4), -1, dtype=torch.int32), 128)) == []


def test_files_with_more_in_them_than_tensors_are_found(compressed: Compressed, tmp_path: Path) -> None:
    shutil.copytree(compressed("native"), tmp_path / "out")
    sidecar = tmp_path / "out" / "llmsqueeze.json"
    record = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(record | {"nbytes": record["nbytes"] + 1}))
    assert "bytes of weights; there are" in check(str(tmp_path / "out"))["errors"][0]
    sidecar.write_text(json.dumps(record))
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    result = check(str(tmp_path / "out"))
    assert not result["sound"]
    assert shard.name in result["errors"][0]


def test_the_index_may_not_leave_the_folder(compressed: Compressed, tmp_path: Path) -> None:
    shutil.copytree(compressed("native"), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][f"{PART}.codes"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    assert "outside the model folder" in check(str(tmp_path / "out"))["errors"][0]


def test_vllm_wants_fused_linears_to_agree(compressed: Compressed, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        group = config["config_groups"]["group_0"]
        group["targets"].remove(LINEAR)
        other = {**group, "targets": [LINEAR], "weights": {**group["weights"], "group_size": 32}}
        config["config_groups"]["group_1"] = other

    tensors = {f"{LINEAR}.weight_scale": lambda t: t.repeat(1, 2)}
    folder = damaged(
        compressed("portable"), tmp_path / "a", put(f"{LINEAR}.weight_scale", tensors[f"{LINEAR}.weight_scale"])
    )
    folder = configured(folder, tmp_path / "b", change)
    (folder / "llmsqueeze.json").unlink()  # its bytes are others now
    unsigned(folder)
    result = check(str(folder))
    assert result["sound"], result["errors"]
    assert result["verdicts"]["transformers"] == ""
    assert "q_proj" in result["verdicts"]["vllm"]
    assert "differ" in result["verdicts"]["vllm"]
    notes = result["notes"], check(str(compressed("portable")))["notes"]
    warned = [any("dequantize=True" in note for note in one) for one in notes]
    assert warned == [True, False], "of several groups"


def test_the_ignore_list_has_to_fit(compressed: Compressed, tmp_path: Path) -> None:
    folder = configured(compressed("portable"), tmp_path / "a", lambda config: config.update(ignore=[]))
    assert any("lm_head is neither a target nor" in error for error in check(str(folder))["errors"])
    folder = configured(compressed("portable"), tmp_path / "b", lambda config: config["ignore"].append("mlp.gate"))
    assert any("the ignore list names mlp.gate" in error for error in check(str(folder))["errors"])


def test_the_command_ends_with_2_if_something_is_wrong(compressed: Compressed, tmp_path: Path) -> None:
    assert command("check", compressed("portable"))[0] == 0
    assert command("check", compressed("native"))[0] == 0, "sound, even if not everything opens it"
    code, stdout, _ = command("check", compressed("native"), "--target", "transformers")
    assert code == 2
    assert "import llmsqueeze.hf" in stdout
    broken = damaged(compressed("native"), tmp_path / "out", put(f"{PART}.scale", first(0.0)))
    code, stdout, _ = command("check", broken, "--json")
    assert code == 2
    assert json.loads(stdout)["sound"] is False
    assert command("check", tmp_path / "nowhere")[0] == 2
    with pytest.raises(RecipeError, match="unknown --target 'vlm'; did you mean 'vllm'"):
        check(str(compressed("native")), "vlm")


# ------------------------------------------------------------------------------------------- folders of other programs


def test_an_original_under_older_names_is_sound(random_model: Callable[..., Path]) -> None:
    """transformers renames the head of GPT-NeoX on loading."""
    result = check(str(random_model("neox")))
    assert (result["state"], result["errors"], result["notes"]) == ("sound", [], [])


def test_an_original_that_lacks_a_tensor_is_not_and_others_are_noted(
    demo_of: Callable[[int], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(demo_of(1), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = check(str(folder))
    assert (result["state"], result["errors"]) == ("not sound", ["model.norm.weight is missing"])
    assert result["notes"] == ["1 tensors, among them mtp.weight, are not part of the model"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "is in awq, another tool's format"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}, "only --trust-remote-code runs"),
        ({"quantization_config": {"quant_method": "llmsqueeze", "format_version": 9}}, "a newer llmsqueeze reads it"),
    ],
)
def test_what_this_command_cannot_tell(
    demo_of: Callable[[int], Path], tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    folder = Path(shutil.copytree(demo_of(1), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    result = check(str(folder))
    assert (result["state"], result["sound"], result["errors"]) == ("cannot tell", False, [])
    assert reason in result["unknown"]
    code, out, _ = command("check", folder)
    assert code == 2
    assert "cannot tell" in " ".join(out.split())
