"""Several processes share a run: real ones, whose folder is that of one process, bit by bit."""

from __future__ import annotations

import shutil
import signal
import socket
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child
from shared_runs import shared_runs
from support import TEXT, refused, thorough
from transformers import MixtralConfig, MixtralForCausalLM

from llmsqueeze.compress.job import open_job
from llmsqueeze.compress.quantize import quantize
from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.errors import RecipeError
from llmsqueeze.model.blockwise.activations import Spill
from llmsqueeze.model.original import Source
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.resolve import make_recipe

SAMPLES = {**TEXT, "samples": 3}  # that two processes have unequally many of
RUNS: dict[str, dict[str, Any]] = {
    "descent": {"method": "descent", "bits": 3, **SAMPLES},
    "coded ends": {"method": "coded", "bits": 3.0, "code_embeddings": True, **SAMPLES},
    "experts": {"method": "budget", "bits": 3.0, "widths": [2, 4], **SAMPLES},
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts with random weights."""
    folder = tmp_path_factory.mktemp("mixtral")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=626, num_attention_heads=4, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL_DIR / file, folder / file)
    return folder


def start(count: int, scratch: Path, *given: object) -> list[Child]:
    """The processes of a run, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [whole | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Child(scratch, shared_runs, *given, **environment) for environment in ranks]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("names", [["descent"], thorough(["descent", "coded ends", "experts"])])
def test_two_processes_one_of_them_killed_write_what_one_writes(
    names: list[str], demo_of: Callable[[int], Path], mixtral: Path, tmp_path: Path
) -> None:
    """The last process is killed after the first block of the first run. The other one stops with one line, and the
    same command goes on."""
    models = {name: mixtral if name == "experts" else demo_of(2 if name == "descent" else 1) for name in names}
    runs = {name: (models[name], RUNS[name]) for name in names}
    one, two = tmp_path / "one", tmp_path / "two"
    first, last = start(2, tmp_path, two, runs, "block-0")
    assert last.ended()[0] == -signal.SIGKILL
    code, err = first.ended()
    assert code == 2, err
    assert "another process of this run has ended" in err
    assert "the same command goes on" in err
    assert len(err.strip().splitlines()) == 1
    assert [path.name for path in two.iterdir()] == ["descent.partial"]
    again = start(2, tmp_path, two, runs)
    for name, (model, settings) in runs.items():
        quantize(Source(str(model)), settings, one / name)
    assert [process.ended() for process in again] == [(0, ""), (0, "")]
    assert contents(two) == contents(one)


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    err = refused("export", "demo", "--to", "gguf-map", "--out", tmp_path / "out")
    assert "export runs in one process, and WORLD_SIZE says that there are 2" in err
    assert "a launcher can start quantize, eval, compare, distill" in err


def test_more_processes_than_samples_are_refused(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of those that are measured, which can be fewer: long ones are soon enough for prices."""
    job = open_job(Source(str(demo_of(1))), make_recipe({"method": "budget", "bits": 3.0, **SAMPLES}), Progress())
    monkeypatch.setattr(processes, "count", lambda: 6)
    with Spill(parent=tmp_path) as spill, pytest.raises(RecipeError, match="6 processes cannot share 3 samples"):
        job.walk(spill)
