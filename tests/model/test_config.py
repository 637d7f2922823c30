"""Models without weights: laid out once for the same folder, and every caller has its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import command, refused
from transformers import AutoConfig, AutoModel

import llmsqueeze
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.model import config
from llmsqueeze.model.original import Source


def test_a_model_is_laid_out_once_and_each_caller_has_its_own(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out, calls = config.laid_out, []
    monkeypatch.setattr(config, "laid_out", lambda *given: (calls.append(given[0]), laid_out(*given))[1])
    folder = Path(shutil.copytree(demo_of(2), tmp_path / "two"))
    first = config.empty_model(folder, config.load_config(folder))
    names = [name for name, _ in first.named_modules()]
    first.model.layers[0].mlp.up_proj = torch.nn.Identity()
    first.model.layers[0].self_attn.layer_idx = 7
    second = config.empty_model(folder, config.load_config(folder))
    assert calls == [folder]
    assert [name for name, _ in second.named_modules()] == names
    assert second.model.layers[0].self_attn.layer_idx == 0
    assert all(tensor.is_meta for tensor in second.parameters())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    assert len(config.empty_model(folder, config.load_config(folder)).model.layers) == 1
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "small.safetensors").write_bytes(bytes(100))
    monkeypatch.setattr("llmsqueeze.model.tensors.bounds.SLACK", 0)
    with pytest.raises(CheckpointError, match="far larger than its files"):
        config.empty_model(folder, config.load_config(folder))


@pytest.fixture
def named(demo_of: Callable[[int], Path], tmp_path: Path) -> Callable[..., Path]:
    """The model with other entries in its config.json."""

    def change(**entries: object) -> Path:
        folder = Path(shutil.copytree(demo_of(1), tmp_path / "named"))
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | entries))
        return folder

    return change


def test_the_class_without_a_head_is_opened_with_one(named: Callable[..., Path], tmp_path: Path) -> None:
    """As AutoModel saves it; whether the head is there is told by the tensors. The result names the whole class."""
    folder = named(architectures=["LlamaModel"])
    expected = json.loads((folder / "config.json").read_text())["model_type"]
    assert expected == "llama"
    code, _, stderr = command("quantize", folder, "--method", "rtn", "--out", tmp_path / "out")
    assert code == 0, stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    settings = AutoConfig.from_pretrained(folder)
    for tied in (True, False):
        settings.tie_word_embeddings = tied
        AutoModel.from_config(settings).save_pretrained(tmp_path / f"{tied}")
    code, _, stderr = command("quantize", tmp_path / "True", "--method", "rtn", "--out", tmp_path / "tied")
    assert code == 0, stderr
    message = refused("quantize", tmp_path / "False", "--method", "rtn", "--out", tmp_path / "apart")
    assert "has no weight lm_head.weight" in message


def test_a_class_that_is_not_installed_is_named(named: Callable[..., Path], tmp_path: Path) -> None:
    message = refused("quantize", named(architectures=["LlamaForGuessing"]), "--out", tmp_path / "out")
    assert "config.json names the class LlamaForGuessing, which transformers" in message
    assert "does not have" in message


@pytest.mark.parametrize("key", config.ATTENTION[:2])
def test_no_attention_kernel_is_needed(key: str, named: Callable[..., Path], tmp_path: Path) -> None:
    """A config may ask for a package that is not there."""
    folder = named(**{key: "flash_attention_2"})
    assert config.load_config(folder)._attn_implementation is None
    code, _, stderr = command("quantize", folder, "--method", "rtn", "--out", tmp_path / "out")
    assert code == 0, stderr
    said = "config.json asks for flash_attention_2, which compression does not need; the result's does not ask for it"
    assert said in " ".join(stderr.split())
    assert config.attention_kernel(json.loads((tmp_path / "out" / "config.json").read_text())) is None
    assert llmsqueeze.load(str(folder)).config._attn_implementation == "sdpa"
    nested = {"a": 1, "text_config": {key: "kernels/x", "b": 2}}
    assert config.attention_kernel(nested) == "kernels/x"
    assert config.without_kernel(nested) == {"a": 1, "text_config": {"b": 2}}
    assert config.attention_kernel({key: "sdpa"}) is None


@pytest.mark.parametrize(
    ("written", "model", "revision"),
    [
        ("owner/name", "owner/name", None),
        ("hf://owner/name", "owner/name", None),
        ("owner/name@main", "owner/name", "main"),
        ("hf://owner/name@refs/pr/1", "owner/name", "refs/pr/1"),
        ("./owner/name@main", "./owner/name@main", None),
        ("demo", "demo", None),
    ],
)
def test_hub_ids_as_people_write_them(written: str, model: str, revision: str | None) -> None:
    source = Source(written)
    assert (source.model, source.revision) == (model, revision)


def test_a_revision_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="owner/name@main contradicts --revision other"):
        Source("owner/name@main", "other")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name@main").mkdir(parents=True)
    assert Source("owner/name@main").model == "owner/name@main", "a folder of that name is one"
