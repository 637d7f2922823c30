"""A result is opened as its user will open it, and "opens in" names what did."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import KINDS, command
from torch import Tensor

import llmsqueeze
from llmsqueeze.cli.tables.runs import opening as rows
from llmsqueeze.errors import VerificationError
from llmsqueeze.formats import verify as verification
from llmsqueeze.formats.inspection import opening
from llmsqueeze.formats.inspection.opening import Opened, open_as_user
from llmsqueeze.formats.inspection.stock import waiting
from llmsqueeze.formats.opened import Folder, open_folder
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.progress import Progress

SAMPLE = torch.arange(3, 35)[None]


def opened(folder: Path, logits: Tensor, opens: dict[str, str]) -> Opened:
    return open_as_user(open_folder(open_checkpoint(folder), False), SAMPLE, logits, opens, Progress())


def reference(folder: Path) -> Tensor:
    with torch.no_grad():
        logits: Tensor = llmsqueeze.load(folder, dtype=torch.float32)(SAMPLE).logits[:, :-1]
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_opens_what_it_wrote(
    kind: str, verified_copy: Callable[..., Any], verifications: dict[str, Any], compressed: Callable[[str], Path]
) -> None:
    """The logits come from the blocks as they were verified, and `load` gives the same."""
    logits, sample = verified_copy(kind).logits, verifications[kind][1].sample
    folder = open_folder(open_checkpoint(compressed(kind)), False)
    result = open_as_user(folder, sample, logits, {"native": "", "transformers": "why"}, Progress())
    assert result == Opened(["native"], {})


def test_stock_transformers_open_a_portable_folder(compressed: Callable[[str], Path]) -> None:
    pytest.importorskip("compressed_tensors")
    folder = compressed("portable")
    assert opened(folder, reference(folder), {"native": "", "transformers": "", "vllm": ""}) == Opened(
        ["native", "transformers"], {}
    )


def test_a_process_that_waits_ends_with_its_context() -> None:
    with waiting() as stock:
        scratch = stock.scratch
        assert (scratch.is_dir(), stock.process.poll()) == (True, None)
    assert (scratch.exists(), stock.process.returncode) == (False, -signal.SIGKILL)


def test_other_logits_are_an_error(compressed: Callable[[str], Path]) -> None:
    folder = compressed("native")
    with pytest.raises(VerificationError, match="gives other logits: they differ by"):
        opened(folder, reference(folder) * 1.01, {"native": ""})


def test_a_folder_that_load_does_not_open_is_an_error(compressed: Callable[[str], Path], tmp_path: Path) -> None:
    """The skeleton of the verification reads tensors by name; what a config says of ties only `load` sees."""
    folder = Path(shutil.copytree(compressed("native"), tmp_path / "folder"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = "model.norm.weight"
    file = folder / index["weight_map"].pop(lost)
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(VerificationError, match=r"load does not open the folder.*model.norm.weight is missing"):
        opened(folder, torch.zeros(1, 31, 626), {"native": ""})


@pytest.mark.parametrize("verb", ["export", "distill"])
def test_what_is_made_from_a_folder_is_opened_too(
    verb: str, compressed: Callable[[str], Path], demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    """Here by `load` alone; a result that it does not open is an error, and stays for whoever looks into it."""
    by_load, rest = opening.by_load, ("--teacher", demo_of(2), "--steps", 1, "--samples", 4, "--seq-len", 16)
    call = ("export", compressed("native"), "--to", "dense") if verb == "export" else ("distill", compressed("native"))
    call = (*call, *rest, "--calibration", "demo") if verb == "distill" else call
    monkeypatch.setattr(opening, "by_transformers", lambda *_: (None, "not here"))
    monkeypatch.setattr(verification, "open_as_user", open_as_user)
    code, out, err = command(*call, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["opened"] == ["native"]
    assert summary["not_opened"] == ({"transformers": "not here"} if verb == "export" else {})
    assert not (tmp_path / "out.partial").exists()
    monkeypatch.setattr(opening, "by_load", lambda *given: (by_load(*given)[0] * torch.nan, ""))
    code, _, err = command(*call, "--out", tmp_path / "other")
    assert (code, (tmp_path / "other").exists()) == (2, False)
    assert "opened by llmsqueeze.load, the folder gives other logits: they differ by nan" in " ".join(err.split())


def test_what_takes_more_memory_than_is_free_is_not_opened(
    compressed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "free_memory", lambda: 1_000_000)
    result = opened(compressed("coded"), torch.zeros(1, 31, 626), {"native": "", "transformers": "why"})
    assert result.runtimes == []
    assert result.why_not["native"].endswith("of memory, and 0.0 GB are free")


def test_memory_of_what_stays_compressed_and_of_what_does_not(compressed: Callable[[str], Path]) -> None:
    def needed(kind: str, runtime: str) -> int:
        folder: Folder = open_folder(open_checkpoint(compressed(kind)), False)
        return opening.memory_needed(folder, runtime)

    assert needed("native", "native") < 0.5 * needed("coded", "native")
    assert needed("portable", "transformers") > 2 * needed("portable", "native")


def test_a_run_says_what_opened_here_and_what_should(
    demo_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "open_as_user", open_as_user)
    monkeypatch.setattr(opening, "by_transformers", lambda *_: (None, "opening it here failed: no such package"))
    code, out, err = command(
        "quantize", demo_of(1), "--method", "rtn", "--bits", 4, "--out", tmp_path / "out", "--json", "--quiet"
    )
    assert code == 0, err
    summary = json.loads(out)
    assert summary["opened"] == ["native"]
    table = rows(summary["opens"], summary["opened"], summary["not_opened"])
    assert table == [
        ("opens in", "llmsqueeze (opened here)"),
        ("should open in", "transformers, vLLM\ntransformers: opening it here failed: no such package"),
    ]
