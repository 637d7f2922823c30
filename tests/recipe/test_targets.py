"""`--for`: what it implies, and what contradicts it."""

from __future__ import annotations

from typing import Any

import pytest

from llmsqueeze.errors import RecipeError
from llmsqueeze.recipe.resolve import make_recipe


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"target": "transformers"}, {"method": "descent", "bits": 3, "portable": True}),
        ({"target": "vllm", "bits": 4}, {"method": "descent", "bits": 4, "portable": True}),
        ({"target": "vllm", "bits": 3.5}, {"method": "budget", "granularity": "group", "portable": True}),
        ({"target": "llama.cpp"}, {"method": "descent", "bits": 4, "group_size": 32, "portable": True}),
        ({"target": "llama.cpp", "bits": 8, "group_size": 64}, {"bits": 8, "group_size": 64}),
        ({"target": "smallest"}, {"method": "coded", "bits": 3, "code_embeddings": True}),
        ({"target": "smallest", "code_embeddings": False}, {"method": "coded", "code_embeddings": False}),
        ({"target": "smallest", "embeddings": 8}, {"method": "coded", "code_embeddings": False, "embeddings": 8}),
        ({"target": "smallest", "size": "4GB"}, {"method": "coded", "bits": None, "size": 4 * 10**9}),
    ],
)
def test_what_a_target_implies(asked: dict[str, Any], expected: dict[str, Any]) -> None:
    recipe = make_recipe(asked)
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert "target" not in recipe.as_dict()
    assert make_recipe(recipe.as_dict()) == recipe


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"target": "vllm", "portable": False}, "--native contradicts --for vllm: vLLM opens"),
        ({"target": "llama.cpp", "bits": 3}, "--bits 3 contradicts --for llama.cpp: export --to gguf holds"),
        ({"target": "llama.cpp", "size": "1GB"}, "--size 1000000000 contradicts --for llama.cpp"),
        ({"target": "smallest", "method": "gptq"}, "--method gptq contradicts --for smallest"),
        ({"target": "transformers", "bits": 3.5, "outliers": 0.01}, "--portable contradicts outliers"),
        ({"target": "ollama"}, "unknown --for 'ollama'"),
    ],
)
def test_what_contradicts_it(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(asked)
