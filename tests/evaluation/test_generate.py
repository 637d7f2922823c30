"""A model answers a prompt: the text that transformers generate, in pieces as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import command, refused, thorough

import llmsqueeze
from llmsqueeze.evaluation import generate as generating
from llmsqueeze.evaluation.generate import Sampling, generate, prompt_tokens, to_dense
from llmsqueeze.evaluation.models import open_model
from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.progress import Progress

PROMPT = "Tom had a red"


def answered(folder: Path, **sampling: Any) -> tuple[str, list[str]]:
    pieces: list[str] = []
    answer = generate(str(folder), PROMPT, Sampling(**{"max_tokens": 12} | sampling), pieces.append, device="cpu")
    assert answer.dense
    return answer.text, pieces


@pytest.mark.parametrize("kind", ["native", thorough("coded"), "portable"])
def test_the_answer_is_what_transformers_generate(kind: str, compressed: Callable[[str], Path]) -> None:
    folder = compressed(kind)
    text, pieces = answered(folder)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    model: Any = llmsqueeze.load(str(folder), dtype=torch.float32)
    opened = open_model(str(folder), torch.device("cpu"), False, "float32")
    tokens = prompt_tokens(opened, PROMPT, plain=False)
    with torch.no_grad():
        row = model.generate(tokens, max_new_tokens=12, do_sample=False)[0, tokens.shape[1] :]
    assert text == opened.tokenizer.decode(row, skip_special_tokens=True)


def test_drawn_tokens_follow_the_seed(demo_of: Callable[[int], Path]) -> None:
    first, again, other = (answered(demo_of(1), temperature=1.0, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != other


def test_a_chat_template_makes_the_prompt_a_users_turn(demo_of: Callable[[int], Path]) -> None:
    opened = open_model(str(demo_of(1)), torch.device("cpu"), False)
    plain = opened.tokenizer(PROMPT)["input_ids"]
    assert prompt_tokens(opened, PROMPT, plain=False)[0].tolist() == plain
    opened.tokenizer.chat_template = "{% for m in messages %}The {{ m.role }}: {{ m.content }}. {% endfor %}"
    turn = opened.tokenizer(f"The user: {PROMPT}. ", add_special_tokens=False)["input_ids"]
    assert prompt_tokens(opened, PROMPT, plain=False)[0].tolist() == turn
    assert prompt_tokens(opened, PROMPT, plain=True)[0].tolist() == plain


def test_without_the_memory_layers_stay_compressed(
    compressed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    class Listens(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    model = llmsqueeze.load(str(compressed("native")))
    monkeypatch.setattr(generating, "free_on", lambda _: 1000)
    assert not to_dense(model, Listens())
    assert any(isinstance(module, SumOfParts) for module in model.modules())
    assert notes[0].startswith("the layers stay compressed, and every token rebuilds them")


def test_the_command_answers_for_two_models(demo_of: Callable[[int], Path], compressed: Callable[[str], Path]) -> None:
    asked = [compressed("native"), PROMPT, "--baseline", demo_of(2), "--max-tokens", 4, "--device", "cpu"]
    code, out, err = command("generate", *asked)
    assert code == 0, err
    result = json.loads(command("generate", *asked, "--json")[1])
    assert [one["model"] for one in result["answers"]] == [str(demo_of(2)), str(compressed("native"))]
    first, second = (f"{one['model']}:\n{one['text']}\n" for one in result["answers"])
    assert out == f"{first}\n{second}"
    assert all(one["tokens"] == 4 for one in result["answers"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["  "], "the prompt is empty"),
        (["x " * 400], "and the model's context 256: give a shorter one"),
        ([PROMPT, "--max-tokens", 0], "--max-tokens"),
    ],
)
def test_what_is_refused(options: list[Any], expected: str, demo_of: Callable[[int], Path]) -> None:
    assert expected in refused("generate", demo_of(1), *options)
