"""The language tower of a multimodal model is compressed; everything else in the folder stays as it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from support import command, refused, tensors_of
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    MllamaConfig,
    PreTrainedModel,
)

import llmsqueeze
from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.config import auto_class, context_length, load_config, vocabulary
from llmsqueeze.model.linears import output_head
from llmsqueeze.model.skeleton import build_skeleton
from llmsqueeze.publish.card import model_card

CPU = torch.device("cpu")
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"vocab_size": 96, "max_position_embeddings": 64}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
CONFIGS = {
    # a tower with more blocks than the text has
    "llava": LlavaConfig(
        text_config={"model_type": "llama", "num_hidden_layers": 2, **TEXT},
        vision_config={"model_type": "clip_vision_model", "num_hidden_layers": 4, **VISION},
        image_token_index=95,
    ),
    # blocks that look at images alone
    "mllama": MllamaConfig(
        text_config={"num_hidden_layers": 3, "cross_attention_layers": [1], "pad_token_id": 0, **TEXT},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "attention_heads": 4,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "image_size": 16,
            "patch_size": 8,
            "vision_output_dim": 128,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
        },
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForImageTextToText.from_config(CONFIGS[request.param]).to(torch.bfloat16).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 16}')
    return folder


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def test_only_the_language_tower_is_compressed(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, err = command(
        "quantize", original, "--method", "rtn", "--bits", "8", "--group-size", "32", "--out", out, "--json", "--quiet"
    )
    assert code == 0, err
    assert json.loads(printed)["opens"]["transformers"] == ""
    skeleton, after = build_skeleton(open_checkpoint(original)), tensors_of(out)
    compressed = {name for name in skeleton.sources if name not in after}
    assert compressed
    assert compressed == {f"{name}.weight" for names in skeleton.linears for name in names}
    assert all("language_model.layers" in name for name in compressed)
    assert all(torch.equal(after[name], skeleton.read(name)) for name in skeleton.sources if name not in compressed)
    assert (out / "preprocessor_config.json").read_text() == '{"size": 16}'
    tokens = torch.arange(20)[None] + 3
    expected = logits_of(AutoModelForImageTextToText.from_pretrained(original, dtype=torch.float32).eval(), tokens)
    loaded = llmsqueeze.load(str(out), dtype=torch.float32)
    assert type(loaded).__name__ == load_config(original).architectures[0]
    close = torch.corrcoef(torch.stack([logits_of(loaded, tokens).flatten(), expected.flatten()]))[0, 1]
    assert close > 0.999
    opened = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits_of(opened, tokens), logits_of(loaded, tokens), rtol=1e-3, atol=1e-3)


def test_the_walk_is_the_models_forward_pass_on_text(original: Path) -> None:
    tokens = torch.arange(20)[None] + 3
    with Spill() as spill, torch.no_grad():
        walk = Walk(build_skeleton(open_checkpoint(original)), [tokens], spill, torch.float32, CPU)
        hidden = next(walk.embed().each(CPU))
        for index in range(len(walk.modules)):
            with walk.resident_block(index):
                hidden = walk.run(index, 0, hidden)
        with walk.head.resident():
            walked = torch.cat([part for _, part in walk.head.logits(hidden, tokens)], dim=1)
        towers = [p for n, p in walk.skeleton.model.named_parameters() if "vision" in n]
        assert all(p.is_meta for p in towers), "a run on text reads no tower"
    expected = logits_of(AutoModelForImageTextToText.from_pretrained(original, dtype=torch.float32).eval(), tokens)
    torch.testing.assert_close(walked, expected[0, :-1], rtol=1e-4, atol=1e-5)


def test_what_the_config_says_of_the_text(original: Path) -> None:
    config = load_config(original)
    assert auto_class(config) is AutoModelForImageTextToText
    assert (vocabulary(config), context_length(config)) == (96, 64)


def test_the_config_alone_is_enough_for_a_plan(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text((original / "config.json").read_text())
    planned = ["plan", folder, "--weights", "none", "--bits", "4.5", "--out", tmp_path / "plan"]
    code, printed, err = command(*planned, "--json")
    assert code == 0, err
    assert json.loads(printed)["nbytes"] < json.loads(printed)["nbytes_original"]
    code, with_towers, err = command(*planned, "--vision", "rtn8", "--json")
    smaller = json.loads(with_towers)["nbytes"]
    towers = json.loads(with_towers)["towers"]
    assert smaller == json.loads(printed)["nbytes"] - towers["nbytes_original"] + towers["nbytes"]
    assert f"other towers: {towers['linears']} linears at 8 bits" in command(*planned, "--vision", "rtn8")[1]


def test_a_class_without_text_is_named(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    config = json.loads((original / "config.json").read_text()) | {"architectures": ["ViTForImageClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "ViTForImageClassification is not a causal language model" in refused(
        "plan", folder, "--weights", "none", "--bits", "4.5", "--out", tmp_path / "plan"
    )


def test_the_head_may_be_the_language_models_own() -> None:
    class Around(PreTrainedModel):
        _supports_sdpa = True

        def __init__(self, config: LlavaConfig) -> None:
            super().__init__(config)
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)

    with torch.device("meta"):
        around, plain = Around(CONFIGS["llava"]), AutoModelForImageTextToText.from_config(CONFIGS["llava"])
    assert around.get_output_embeddings() is None
    assert output_head(around) is around.language_model.lm_head
    assert output_head(plain) is plain.lm_head
    assert output_head(plain.model) is None


def test_other_towers_are_rounded_if_it_is_asked_for(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rtn = ["--method", "rtn", "--bits", "4", "--group-size", "32", "--quiet"]
    code, printed, err = command("quantize", original, *rtn, "--vision", "rtn8", "--out", out, "--json")
    assert code == 0, err
    summary, skeleton = json.loads(printed), build_skeleton(open_checkpoint(original))
    towers = skeleton.tower_linears
    assert any("vision" in name for name in towers)
    assert any("projector" in name for name in towers)
    assert not any("language_model" in name or "lm_head" in name for name in towers)
    assert summary["towers"]["linears"] == len(towers)
    assert summary["towers"]["nbytes"] < 0.6 * summary["towers"]["nbytes_original"]
    assert summary["bits_per_weight"] == 4.5, "they are not counted in the average"
    assert summary["why_native"].startswith("--vision rtn8")
    loaded = llmsqueeze.load(str(out), dtype=torch.float32)
    for name in towers:
        weight, stored = loaded.get_submodule(name).weight, skeleton.read(f"{name}.weight").float()
        assert 0 < (weight - stored).abs().max() < 0.02 * stored.abs().max()
    code, printed, err = command("check", out, "--json")
    assert f"{len(towers)} linears of other towers" in json.loads(printed)["notes"][0]
    assert f"| Linear layers of other towers, at 8 bits |  | {len(towers)} |" in model_card(out)
    code, printed, err = command("quantize", original, *rtn, "--out", tmp_path / "dense", "--json")
    assert json.loads(printed)["towers"] is None
    plain, tokens = llmsqueeze.load(str(tmp_path / "dense"), dtype=torch.float32), torch.arange(20)[None] + 3
    torch.testing.assert_close(logits_of(loaded, tokens), logits_of(plain, tokens))


def test_the_summary_counts_what_text_does_not_reach(tmp_path: Path) -> None:
    config, folder = copy.deepcopy(CONFIGS["mllama"]), tmp_path / "original"
    config.text_config.vocab_size = 512
    torch.manual_seed(1)
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((MODEL_DIR / file).read_bytes())
    options = ["--method", "gptq", "--bits", "4", "--calibration", "demo", "--samples", "2", "--seq-len", "16"]
    code, printed, err = command("quantize", folder, *options, "--out", tmp_path / "out", "--json", "--quiet")
    assert code == 0, err
    looks_at_images = build_skeleton(open_checkpoint(folder)).linears[1]
    assert json.loads(printed)["unreached"] == len(looks_at_images)


def test_a_text_model_has_no_other_towers(demo_dir: Path, tmp_path: Path) -> None:
    said = refused("quantize", demo_dir, "--bits", "4", "--vision", "rtn8", "--out", tmp_path / "out")
    assert "--vision rtn8 belongs to multimodal models" in said
    said = refused("quantize", demo_dir, "--bits", "4", "--vision", "rtn8", "--portable", "--out", tmp_path / "out")
    assert "--portable contradicts --vision rtn8" in said
