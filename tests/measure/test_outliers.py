"""Outlier rankings: what each prefers, ties, seeds, and how many candidates there are."""

from __future__ import annotations

import torch

from llmsqueeze.measure import outliers


def ranked(
    ranking: str, weight: torch.Tensor, gradients: list[torch.Tensor], error: torch.Tensor | None = None
) -> list[int]:
    """Flat indices, best first."""
    total = torch.stack([outliers.of_sample(g, ranking) for g in gradients]).sum(dim=0) if gradients else None
    scores = outliers.score(weight, total, error, ranking, torch.Generator().manual_seed(0))
    return outliers.best(scores, weight.numel()).index.tolist()


def test_what_each_ranking_prefers() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0]])
    gradients = [torch.tensor([[3.0, 1.0, -1.0]]), torch.tensor([[-3.0, 0.0, 2.0]])]
    assert ranked("gradient", weight, gradients) == [0, 2, 1], "6, 1, 3: signs do not cancel between samples"
    assert ranked("gradient-weight", weight, gradients) == [2, 0, 1], "18 * 1, 1 * 16, 5 * 4"
    assert ranked("gradient-error", weight, gradients, torch.tensor([[0.1, 0.9, 0.1]])) == [1, 0, 2]
    assert ranked("magnitude", weight, []) == [1, 2, 0]


def test_random_is_random_and_seeded() -> None:
    scores = [
        outliers.score(torch.zeros(40, 40), None, None, "random", torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_ties_and_dead_rows_are_settled_by_position() -> None:
    scores = torch.zeros(4, 5)
    scores[2, 3] = 1
    assert outliers.best(scores, 4).index.tolist() == [13, 0, 1, 2]
    assert outliers.best(scores, 0).index.tolist() == []


def test_best_equals_a_full_sort(generator: torch.Generator) -> None:
    scores = torch.randint(0, 50, (30, 40), generator=generator).float()
    order = sorted(range(1200), key=lambda i: (-float(scores.view(-1)[i]), i))
    assert outliers.best(scores, 100).index.tolist() == order[:100]


def test_candidates_leave_room_for_what_is_asked() -> None:
    assert outliers.candidate_count(10_000, 0.01, "layer") == 200
    assert outliers.candidate_count(10_000, 0.05, "layer") == 500
    assert outliers.candidate_count(10_000, 0.01, "global") == 400
    assert outliers.candidate_count(100, 0.5, "global") == 100
