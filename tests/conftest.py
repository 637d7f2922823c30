"""Fixtures: the built-in model, the real models beside the repository (skipped where absent), tiny random ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

# several workers share the cores; what they start inherits it. To be set before torch is imported
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import torch

# without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is imported, which transformers does
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from children import tokenized_once
from safetensors.torch import load_file, save_file

from llmsqueeze.demo import MODEL_DIR

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def texts_are_tokenized_once() -> Iterator[None]:
    """The same tokenizer gives the same text the same tokens: hundreds of runs read the same text."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llmsqueeze.text.rows.token_ids", tokenized_once())
        yield


@pytest.fixture(scope="session", autouse=True)
def products_are_float32() -> Iterator[None]:
    """What tests see does not depend on the processor's units for bfloat16."""
    with pytest.MonkeyPatch.context() as patched:
        for user in ("compress.job", "distillation.distill"):
            patched.setattr(f"llmsqueeze.{user}.fastest_dtype", lambda _: torch.float32)
        yield


@pytest.fixture(scope="session", autouse=True)
def results_are_not_opened() -> Iterator[None]:
    """By programs, at the end of hundreds of runs; tests/formats/test_opening.py does it."""
    from llmsqueeze.formats.inspection.opening import Opened

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llmsqueeze.formats.verify.open_as_user", lambda *_: Opened())
        patched.setattr("llmsqueeze.formats.verify.waiting", nullcontext)
        patched.setattr("llmsqueeze.formats.verify.tried", lambda *_: {})
        yield


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    return MODEL_DIR


@pytest.fixture(scope="session")
def demo_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """blocks -> folder of the built-in model cut to its first decoder blocks: a quick real model."""
    folders: dict[int, Path] = {}

    def cut(blocks: int) -> Path:
        if blocks not in folders:
            folders[blocks] = Path(shutil.copytree(MODEL_DIR, tmp_path_factory.mktemp("demo") / f"demo-{blocks}"))
            config = json.loads((MODEL_DIR / "config.json").read_text())
            changed = {"num_hidden_layers": blocks}
            if "layer_types" in config:
                changed["layer_types"] = config["layer_types"][:blocks]
            (folders[blocks] / "config.json").write_text(json.dumps(config | changed))
            beyond = tuple(f"model.layers.{i}." for i in range(blocks, config["num_hidden_layers"]))
            tensors = load_file(MODEL_DIR / "model.safetensors")
            kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(beyond)}
            save_file(kept, folders[blocks] / "model.safetensors", {"format": "pt"})
        return folders[blocks]

    return cut


@pytest.fixture(scope="session")
def verifications() -> dict[str, tuple[Any, Any]]:
    """kind -> digests and `Computed` that the verification of `compressed(kind)` was given."""
    return {}


@pytest.fixture(scope="session")
def compressed(
    demo_of: Callable[[int], Path],
    tmp_path_factory: pytest.TempPathFactory,
    verifications: dict[str, tuple[Any, Any]],
) -> Callable[[str], Path]:
    """kind (`support.KINDS`) -> folder of the two-block demo compressed so; read it, and copy it to change it."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            from support import KINDS, command

            out = tmp_path_factory.mktemp("compressed") / kind
            recipe = out.with_suffix(".yaml")
            recipe.write_text(json.dumps(KINDS[kind]))
            from llmsqueeze.formats import verify

            verify_, given = verify.verify, []
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(verify, "verify", lambda *given_: (given.append(given_), verify_(*given_))[1])
                code, _, err = command("quantize", demo_of(2), "--recipe", recipe, "--out", out, "--quiet")
            verifications[kind] = given[0][0].digests, given[0][1]
            assert code == 0, err
            folders[kind] = out
        return folders[kind]

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "models").is_dir():
        pytest.skip(f"the real models are not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def original() -> Any:
    """The built-in model as transformers opens it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(architecture, dtype) -> folder of a tiny random model without tokenizer; for coverage, never for quality."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def make(architecture: str, dtype: torch.dtype = torch.float32) -> Path:
        if (architecture, dtype) not in folders:
            from architectures import unusual
            from support import configs
            from transformers import AutoModelForCausalLM

            torch.manual_seed(1)
            folder = tmp_path_factory.mktemp(architecture.replace(" ", "-"))
            model = AutoModelForCausalLM.from_config((configs() | unusual())[architecture]).to(dtype)
            model.save_pretrained(folder)
            folders[architecture, dtype] = folder
        return folders[architecture, dtype]

    return make


@pytest.fixture
def rows() -> list[torch.Tensor]:
    """Token rows for the tiny random models."""
    make = torch.Generator().manual_seed(3)
    return [torch.randint(0, 96, (1, 24), generator=make) for _ in range(3)]


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.nn.Module]]:
    """A tiny mixture of experts (mixtures.py) by its type: its folder and the model."""
    from mixtures import make

    made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def get(name: str) -> tuple[Path, torch.nn.Module]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, make(name, folder)
        return made[name]

    return get
