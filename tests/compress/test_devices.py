"""Runs on a GPU that is pretended: nothing meets what is on the CPU, and the folders are those of a run on the CPU."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import MIXED, pretended_gpu
from support import thorough
from torch import Tensor

import llmsqueeze
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.distillation import student
from llmsqueeze.distillation.distill import distill
from llmsqueeze.distillation.settings import make_distillation
from llmsqueeze.files import SIDECAR
from llmsqueeze.model.original import Source

# more samples than one: else all of the moments off the diagonal may count as chance, and ties are rounded either way
TEXT = {"calibration": "demo", "samples": 2, "seq_len": 16}
# every operation is looked at, so each run takes several paths at once, on few widths, and those that are dear have one
# block: what goes on from block to block is in the others
ONE_BLOCK = ("coded, embeddings, outliers and factors too", "budget, packed")
FEW_RUNS = ("gwq",)
FEW = {"method": "budget", "bits": 3.0, "widths": [2, 4]}
RUNS: dict[str, dict[str, Any]] = {
    "coded, embeddings, outliers and factors too": {
        "method": "coded",
        "bits": 4.0,
        "code_embeddings": True,
        "outliers": 0.01,
        "lorc_rank": 1,
    },
    "budget, packed": FEW | {"row_outliers": [0.02], "lorc_rank": "auto", "pack": "rans", "quantizer": "gptq"},
    "budget, portable": FEW | {"portable": True, "quantizer": "rtn"},
    "gwq": {"method": "gwq", "bits": 3, "outlier_scope": "global", "quantizer": "gptq"},
    "gwq at random": {"method": "gwq", "bits": 3, "outlier_ranking": "random", "quantizer": "rtn"},
    "layerwise, packed": {"method": "layerwise", "bits": 3.0, "pack": "rans", "quantizer": "rtn"},
    "mixllm": {"method": "mixllm", "bits": 4, "quantizer": "rtn"},
    "dbllm": {"method": "dbllm", "quantizer": "gptq"},
}


@pytest.fixture(scope="module")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """blocks -> a random model with the demo's tokenizer, so small that every operation may be looked at."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    @functools.cache
    def make(blocks: int) -> Path:
        torch.manual_seed(1)
        folder = tmp_path_factory.mktemp("tiny")
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=626,
            max_position_embeddings=64,
        )
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
        for file in MODEL_DIR.glob("tokenizer*"):
            shutil.copy(file, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def tiny(tiny_of: Callable[[int], Path]) -> Path:
    return tiny_of(2)


@pytest.fixture
def gpu() -> Iterator[Any]:
    with pretended_gpu() as gpu:
        yield gpu


@pytest.mark.parametrize("name", [name if name in FEW_RUNS else thorough(name) for name in RUNS])
def test_a_gpu_gives_what_the_cpu_gives(name: str, tiny_of: Callable[[int], Path], tmp_path: Path) -> None:
    source = Source(str(tiny_of(1 if name in ONE_BLOCK else 2)))
    options = RUNS[name] if RUNS[name].get("outlier_ranking") == "random" else TEXT | RUNS[name]
    quantize(source, options, tmp_path / "cpu", device="cpu")
    with pretended_gpu():
        summary = quantize(source, options, tmp_path / "cuda", device="auto")
    assert summary["peak_device_memory_mb"] == 123.0
    files = sorted(file.name for file in (tmp_path / "cpu").iterdir() if file.name != SIDECAR)
    assert any(file.endswith(".safetensors") for file in files)
    for file in files:
        assert (tmp_path / "cuda" / file).read_bytes() == (tmp_path / "cpu" / file).read_bytes(), file


@pytest.fixture(scope="module")
def coded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coded") / "tiny"
    quantize(Source(str(tiny)), TEXT | {"method": "coded", "bits": 3.0}, out, device="cpu")
    return out


@pytest.mark.parametrize("keep_codes", [thorough(False), True])
def test_a_coded_folder_opens_on_a_gpu(coded: Path, keep_codes: bool) -> None:
    def logits(device: str) -> Tensor:
        model = llmsqueeze.load(str(coded), keep_codes=keep_codes, device_map={"": torch.device(device)})
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.device.type for tensor in tensors} == {device}
        with torch.no_grad():
            output: Tensor = model(input_ids=torch.arange(3, 20, device=device)[None]).logits
        return output.cpu()

    with pretended_gpu():
        on_gpu = logits("cuda")
    assert torch.equal(on_gpu, logits("cpu"))


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{"steps": 2}, {"steps": 2, "blockwise": True}], ids=["whole", "blockwise"])
def test_a_coded_folder_is_distilled_on_a_gpu(
    settings: dict[str, Any], coded: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distillation = make_distillation(settings | {"calibration": "demo", "samples": 2, "seq_len": 16, "held_back": 2})
    distill(str(coded), str(tiny), distillation, tmp_path / "cpu", device="cpu")
    again = student.checkpoint
    with pretended_gpu() as gpu:  # blocks are run again in the backward pass
        monkeypatch.setattr(student, "checkpoint", lambda forward, *args, **kw: again(gpu.within(forward), *args, **kw))
        distill(str(coded), str(tiny), distillation, tmp_path / "cuda", device="cuda")
    weights = sorted(file.name for file in (tmp_path / "cpu").glob("*.safetensors"))
    assert weights
    for file in weights:
        assert (tmp_path / "cuda" / file).read_bytes() == (tmp_path / "cpu" / file).read_bytes(), file


# ------------------------------------------------------------------------------------------- the pretended GPU


def test_what_is_moved_says_so(gpu: Any) -> None:
    here, there = torch.ones(2, 3), torch.ones(2, 3, device="cuda")
    assert (here.device.type, there.device.type) == ("cpu", "cuda")
    assert (there[:1] * 2).T.device.type == there.double().device.type == torch.zeros_like(there).device.type == "cuda"
    assert there.cpu().device.type == there.to("cpu", torch.float64).device.type == "cpu"
    assert here.to(there).device.type == torch.nn.Linear(3, 1).to("cuda").weight.device.type == "cuda"
    assert (there.cpu().numpy() == here.numpy()).all()
    assert here.to("cuda").data_ptr() != here.data_ptr()
    assert here.device.type == "cpu"


def test_two_devices_do_not_meet(gpu: Any) -> None:
    here, there = torch.ones(2, 3), torch.ones(2, 3, device="cuda")
    for meeting in (lambda: here + there, lambda: there @ here.T, lambda: torch.equal(here, there)):
        with pytest.raises(RuntimeError, match=MIXED):
            meeting()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    assert (there * torch.tensor(2.0)).sum() == 12  # single numbers are free
    assert torch.equal(there[torch.tensor([1])], there[1:])  # and so are places
    there.copy_(here * 3)
    assert float(there.sum()) == 18


def test_a_backward_pass_stays_where_it_is(gpu: Any) -> None:
    seen = []
    x = torch.ones(2, 3, device="cuda", requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append((gradient.device.type, torch.zeros(1, device=gradient.device).device)))
    y.sum().backward()
    assert seen == [("cuda", torch.device("cuda", 0))]
    assert x.grad is not None
    assert x.grad.device.type == "cuda"
