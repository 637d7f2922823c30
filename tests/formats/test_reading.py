"""One reading of a folder serves all comparisons and checks: each tensor is read from disk once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from support import KINDS
from torch import Tensor

from llmsqueeze.compress import pipeline
from llmsqueeze.formats import verify as verification
from llmsqueeze.formats.check import check
from llmsqueeze.formats.entries import read_entries
from llmsqueeze.model import checkpoint as checkpoints
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.recipe.resolve import make_recipe


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each tensor was read from disk, by the folder of its file and its name."""
    count: Counter[tuple[str, str]] = Counter()

    class Counted:
        def __init__(self, file: Path, **options: Any) -> None:
            self.folder, self.file = file.parent.name, safe_open(file, **options)

        def __enter__(self) -> Counted:
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

        def get_tensor(self, name: str) -> Tensor:
            count[self.folder, name] += 1
            tensor: Tensor = self.opened.get_tensor(name)
            return tensor

    monkeypatch.setattr(checkpoints, "safe_open", Counted)
    return count


def once(folder: Path) -> Counter[tuple[str, str]]:
    return Counter({(folder.name, name): 1 for name in open_checkpoint(folder).tensors})


@pytest.mark.parametrize("kind", KINDS)
def test_one_reading_compares_everything(
    kind: str,
    compressed: Callable[[str], Path],
    verified_copy: Callable[..., verification.Verified],
    reads: Counter[tuple[str, str]],
    tmp_path: Path,
) -> None:
    folder = compressed(kind)
    reads.clear()
    verified = verified_copy(kind)
    assert reads == once(tmp_path / "out.partial"), "each tensor is read once"
    checkpoint = open_checkpoint(folder)
    assert verified.compared == {
        "tensors": len(checkpoint.tensors),
        "weights": len(read_entries(checkpoint)),
        "blocks": 2,
        "largest_difference": 0.0,
    }
    assert verified.opens == check(str(folder))["verdicts"]
    assert verified.opens["native"] == ""
    assert (verified.opens["transformers"] == "") is (kind == "portable")


@pytest.mark.parametrize("kind", ["portable", "coded"])
def test_check_reads_every_tensor_once(
    kind: str, compressed: Callable[[str], Path], reads: Counter[tuple[str, str]]
) -> None:
    folder = compressed(kind)
    reads.clear()
    assert check(str(folder))["sound"]
    assert reads == once(folder)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_untied_heads_and_transposed_weights_are_read_once(
    architecture: str, random_model: Callable[..., Path], reads: Counter[tuple[str, str]], tmp_path: Path
) -> None:
    recipe = make_recipe({"method": "rtn", "bits": 4, "group_size": 16})
    summary = pipeline.compress_model(str(random_model(architecture)), recipe, tmp_path / "out")
    assert summary.verified is not None
    assert summary.verified["blocks"] == 3
    back = {name: times for (folder, name), times in reads.items() if folder == "out.partial"}
    assert back == dict.fromkeys(open_checkpoint(tmp_path / "out").tensors, 1)
