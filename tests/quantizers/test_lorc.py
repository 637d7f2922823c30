"""Low-rank compensation against the full SVD, in the file, and with other methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import TEXT, correlated_moments
from torch import Tensor

import llmsqueeze
from llmsqueeze import parts
from llmsqueeze.allocation.plan import Rows, WeightPlan
from llmsqueeze.compress.pipeline import compress_model as quantize
from llmsqueeze.compress.weights.weight import WeightSettings, compress_weight
from llmsqueeze.errors import RecipeError
from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.parts import Grid, LowRank
from llmsqueeze.quantizers import lorc
from llmsqueeze.quantizers.curvature import Curvature, factorize, row_error
from llmsqueeze.recipe.resolve import make_recipe


@pytest.fixture
def curvature(generator: torch.Generator) -> Curvature:
    """Inputs of very different size, correlated."""
    scale = torch.logspace(-1, 1, 40)
    return factorize(correlated_moments(40, generator) * scale * scale[:, None])


@pytest.fixture
def error(generator: torch.Generator) -> Tensor:
    return torch.randn(24, 40, generator=generator)


def best(matrix: Tensor, rank: int) -> Tensor:
    """The slow twin: the full SVD with the small singular values set to 0."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u * torch.where(torch.arange(len(s)) < rank, s, 0.0)) @ vt


@pytest.mark.parametrize("rank", [1, 3, 24])
def test_truncation_is_the_best_of_its_rank(rank: int, error: Tensor) -> None:
    left, right = lorc.truncated_svd(error, rank)
    assert torch.allclose((left @ right).double(), best(error, rank), atol=1e-4)
    singular = torch.linalg.svdvals(error)
    assert (error - left @ right).norm() == pytest.approx(float(singular[rank:].norm()), abs=1e-3), "Eckart-Young"
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-4), "split evenly"


def test_the_randomised_svd_is_nearly_as_good(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lorc, "EXACT", 16)
    matrix = torch.randn(120, 200, generator=generator)  # a flat spectrum is the hard case
    exact = (matrix - best(matrix, 6).float()).norm()
    left, right = lorc.truncated_svd(matrix, 6, seed=1)
    assert exact <= (matrix - left @ right).norm() * 1.0001
    assert (matrix - left @ right).norm() < 1.01 * exact
    again = lorc.truncated_svd(matrix, 6, seed=1)
    assert torch.equal(again[0], left)


def test_input_weighting_is_optimal_for_the_output_error(error: Tensor, curvature: Curvature) -> None:
    """Against the root of H from its eigenvectors; the code uses a triangular root."""
    values, vectors = torch.linalg.eigh(curvature.H.double())
    root = vectors * values.sqrt()
    floor = torch.linalg.svdvals(error.double() @ root)[3:].square().sum()
    weighted = error - lorc.factors(error, 3, curvature, torch.float32).dense()
    plain = error - lorc.factors(error, 3, None, torch.float32).dense()
    output = [float(row_error(left, curvature.H).sum()) for left in (weighted, plain)]
    assert floor * 0.999 < output[0] < floor * 1.02, "8 bits cost little"
    assert output[0] < 0.9 * output[1]
    assert plain.norm() < weighted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_factors_survive_eight_bits(dtype: torch.dtype, size: float, error: Tensor) -> None:
    left, right = (factor * size**0.5 for factor in lorc.truncated_svd(error, 4))
    part = LowRank.from_factors(left, right, dtype)
    assert (part.dense() - left @ right).norm() < 0.02 * (left @ right).norm()
    restored = parts.restore((24, 40), part.spec(), part.tensors())
    assert torch.equal(restored.dense(), part.dense())
    assert parts.layout_nbytes((24, 40), [part.spec()]) == parts.nbytes([part]) == 4 * (24 + 40) + 4 * dtype.itemsize


def parts_of(
    weight: Tensor, curvature: Curvature, bits: int, mask: Tensor | None = None, rank: int = 4
) -> tuple[list[parts.Part], Tensor, float]:
    outliers = 0 if mask is None else int(mask.sum())
    rows = (Rows(Grid(bits, 40, symmetric=True), 24),)
    planned = WeightPlan("w", (24, 40), torch.float32, "rtn", rows, outliers, rank)
    return compress_weight(weight, weight, planned, curvature, mask, None, WeightSettings())


def test_compensation_lowers_the_output_error(error: Tensor, curvature: Curvature) -> None:
    with_rank, without = parts_of(error, curvature, 2), parts_of(error, curvature, 2, rank=0)
    assert with_rank[2] < 0.7 * without[2]
    assert torch.equal(parts.sum_of_parts(with_rank[0]), with_rank[1])


def test_a_weight_that_it_does_not_help_keeps_none(curvature: Curvature, generator: torch.Generator) -> None:
    levels = torch.randint(-127, 128, (24, 40), generator=generator).float()
    levels[:, 0] = 127.5  # every row's scale is 1: rounding is nearly exact
    weight_parts, _, error = parts_of(levels.round(), curvature, 8)
    assert error < 1e-4
    exact = parts_of(torch.zeros(24, 40), curvature, 8)[0]
    assert not any(isinstance(part, LowRank) for part in exact)
    assert sum(isinstance(part, LowRank) for part in weight_parts) <= 1


def test_outliers_stay_exact_under_compensation(
    error: Tensor, curvature: Curvature, generator: torch.Generator
) -> None:
    mask = torch.rand(24, 40, generator=generator) < 0.05
    weight_parts, dense, _ = parts_of(error, curvature, 2, mask)
    assert any(isinstance(part, LowRank) for part in weight_parts)
    assert torch.equal(dense[mask], error[mask])


def test_factors_are_counted_stored_and_loaded(compressed: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(compressed("factors"))
    config = checkpoint.config["quantization_config"]
    assert config["format_version"] == 2
    ranks = [s["rank"] for w in config["weights"].values() for s in w["parts"] if s["part"] == "lowrank"]
    assert set(ranks) == {4}
    loaded = llmsqueeze.load(str(compressed("factors")))
    assert sum(isinstance(module, SumOfParts) for module in loaded.modules()) == len(config["weights"])
    counted = sum(parts.layout_nbytes(tuple(entry["shape"]), entry["parts"]) for entry in config["weights"].values())
    stored = [t.nbytes for n, t in checkpoint.tensors.items() if ".parts." in n]
    assert sum(stored) == counted


@pytest.mark.parametrize(("method", "bits"), [("gwq", 3), ("budget", 2.9)])
def test_factors_go_with_outliers_and_within_a_budget(
    method: str, bits: float, demo_of: Callable[[int], Path], tmp_path: Path
) -> None:
    recipe = make_recipe({"method": method, "quantizer": "rtn", "bits": bits, "lorc_rank": 4, **TEXT})
    summary = quantize(str(demo_of(1)), recipe, tmp_path / "out")
    weights = open_checkpoint(tmp_path / "out").config["quantization_config"]["weights"].values()
    assert {spec["rank"] for w in weights for spec in w["parts"] if spec["part"] == "lowrank"} == {4}
    if method == "budget":
        assert 2.8 < summary.bits_per_weight <= 2.9
    else:
        assert all(w["parts"][-1]["part"] == "sparse" for w in weights)


def test_a_rank_beyond_the_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--lorc-rank 5000 is more than model\.layers\.0\..* has: it is"):
        quantize("demo", make_recipe({"method": "rtn", "lorc_rank": 5000}), tmp_path / "out")
