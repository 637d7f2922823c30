"""Exports that the tests of this folder share."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmsqueeze.allocation.plan import Plan, WeightPlan
from llmsqueeze.compress.decision.decide import Decision
from llmsqueeze.compress.job import open_job
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.compress.weights import weight
from llmsqueeze.formats import verify as verification
from llmsqueeze.formats.export import export
from llmsqueeze.formats.folder import Output
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.resolve import make_recipe

LORC = {"method": "rtn", "bits": 3, "group_size": 64, "lorc_rank": 2, "lorc": "plain"}


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    return torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def adaptable(demo_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factors of each rank from 1 to 10; none planned for the value projections, none kept for the key projections."""
    recipe = make_recipe(LORC)
    source = Source(str(demo_of(2)))
    ranks = itertools.count(1)
    plan = Plan(
        {
            name: replace(w, rank=0 if "v_proj" in name else 3 if "k_proj" in name else next(ranks))
            for name, w in open_job(source, recipe, Progress()).plan.weights.items()
        }
    )
    compensation = weight.compensation

    def some(target: Tensor, rounded: Any, planned: WeightPlan, *rest: Any) -> Any:
        return [] if planned.name.endswith("k_proj") else compensation(target, rounded, planned, *rest)

    out = tmp_path_factory.mktemp("adaptable") / "adaptable"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weight, "compensation", some)
        quantize(source, recipe, out, decision=Decision(plan))
    return out


@pytest.fixture(scope="session")
def exported(
    compressed: Callable[[str], Path], adaptable: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """(kind, format, options) -> the export of `compressed(kind)`, or of `adaptable`, and its summary; read it only."""
    ready: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}

    def make(kind: str, to: str, **options: Any) -> tuple[Path, dict[str, Any]]:
        key = kind, to, *options.items()
        if key not in ready:
            folder = adaptable if kind == "adaptable" else compressed(kind)
            out = tmp_path_factory.mktemp("exported") / f"{kind}-{to}"
            ready[key] = out, export(str(folder), to, out, **options)
        return ready[key]

    return make


@pytest.fixture
def verified_copy(
    compressed: Callable[[str], Path], verifications: dict[str, Any], tmp_path: Path
) -> Callable[..., verification.Verified]:
    """(kind, damage) -> the verification of a copy of that folder, damaged between writing and verifying."""

    def verify(kind: str, damage: Callable[[Path], None] = lambda _: None) -> verification.Verified:
        output = Output(tmp_path / "out", 1)
        shutil.copytree(compressed(kind), output.partial)
        output.digests, computed = verifications[kind]
        damage(output.partial)
        return verification.verify(output, computed)

    return verify
