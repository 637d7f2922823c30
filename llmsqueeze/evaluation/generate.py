"""The verb `generate`: a model goes on from a prompt, or answers it by its chat template, token by token.

Layers that are compressed in memory are rebuilt at every call, which a token at a time is slow. So they become ordinary
ones first, if the memory suffices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TextStreamer

from llmsqueeze.errors import RecipeError, UnsupportedError, foreign
from llmsqueeze.evaluation.models import OpenModel, open_model
from llmsqueeze.formats.hf.layer import SumOfParts
from llmsqueeze.formats.load import load
from llmsqueeze.memory import fits, free_on
from llmsqueeze.model.original import pick_device
from llmsqueeze.progress import Progress

LARGEST = torch.float32.itemsize  # of the dtypes that it may compute in


@dataclass(frozen=True)
class Sampling:
    """max_tokens: the most that are added. temperature: 0 takes the likeliest token, else they are drawn by `seed`.
    plain: goes on from the prompt even if the tokenizer has a chat template."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    plain: bool = False


@dataclass(frozen=True)
class Answer:
    """text: what was added to the prompt. tokens: how many tokens that is. seconds: from the prompt to the last of
    them. dense: whether all layers computed as ordinary ones."""

    model: str
    text: str
    tokens: int
    seconds: float
    dense: bool

    def as_dict(self) -> dict[str, Any]:
        rate = round(self.tokens / self.seconds, 2) if self.seconds else None
        return vars(self) | {"seconds": round(self.seconds, 3), "tokens_per_second": rate}


def generate(
    name: str,
    prompt: str,
    sampling: Sampling,
    on_text: Callable[[str], object],
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Answer:
    """Opens a folder or Hub id, compressed or not, and answers; `on_text` gets the text as it comes.

    Raises RecipeError for an empty prompt or one that leaves no room in the model's context, UnsupportedError for a
    model that does not generate.
    """
    if not prompt.strip():
        raise RecipeError("the prompt is empty; give a text to go on from")
    progress, dense = progress or Progress(), True

    def loader(name: str, **given: Any) -> PreTrainedModel:
        nonlocal dense
        model = load(name, **given)
        dense = to_dense(model, progress)
        return model

    opened = open_model(name, pick_device(device), trust_remote_code, dtype, progress, loader)
    tokens = prompt_tokens(opened, prompt, sampling.plain).to(opened.model.device)
    return answer(opened, tokens, sampling, on_text, dense)


def prompt_tokens(opened: OpenModel, prompt: str, plain: bool) -> Tensor:
    """[1, length]: the prompt as a user's turn of the chat template, or as it is if there is none, or if `plain`."""
    tokenizer: Any = opened.tokenizer
    chat = bool(getattr(tokenizer, "chat_template", None)) and not plain
    if chat:
        with foreign(UnsupportedError, "the chat template does not take a prompt", "--plain does without it"):
            turn = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    tokens: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not tokens.numel():
        raise RecipeError("the tokenizer makes no token of the prompt; give another text")
    return tokens


def answer(
    opened: OpenModel, tokens: Tensor, sampling: Sampling, on_text: Callable[[str], object], dense: bool
) -> Answer:
    """Goes on from tokens [1, length]."""
    model, length = opened.model, tokens.shape[1]
    if not model.can_generate():
        raise UnsupportedError(f"{opened.name} is no model that transformers generates with")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length >= most:
        raise RecipeError(f"the prompt has {length} tokens, and the model's context {most}: give a shorter one")
    count = sampling.max_tokens if most is None else min(sampling.max_tokens, most - length)
    drawn = {"do_sample": True, "temperature": sampling.temperature} if sampling.temperature else {"do_sample": False}
    pieces = Pieces(opened.tokenizer, on_text)
    torch.manual_seed(sampling.seed)
    start = time.perf_counter()
    with torch.no_grad(), foreign(UnsupportedError, f"transformers cannot generate with {opened.name}"):
        result = untyped(model).generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            pad_token_id=first_of(model.generation_config.eos_token_id),
            streamer=pieces,
            **drawn,
        )
    seconds = time.perf_counter() - start
    return Answer(opened.name, "".join(pieces.so_far), result.shape[1] - length, seconds, dense)


class Pieces(TextStreamer):
    """Hands on the text as it comes, without the prompt and without special tokens."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.so_far: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.so_far.append(text)
            self._on_text(text)


def to_dense(model: PreTrainedModel, progress: Progress) -> bool:
    """Makes compressed layers ordinary ones, if the memory suffices; whether none is left."""
    layers = [module for module in model.modules() if isinstance(module, SumOfParts)]
    if not layers:
        return True
    needed = sum(layer.out_features * layer.in_features for layer in layers) * LARGEST
    free = free_on(model.device)
    if free is not None and not fits(needed, free):
        progress.note(
            f"the layers stay compressed, and every token rebuilds them: dense they take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free"
        )
        return False
    untyped(model).dequantize()
    return True


def first_of(ids: int | list[int] | None) -> int | None:
    """One id of those that end a text."""
    return ids[0] if isinstance(ids, list) else ids


def untyped(value: object) -> Any:
    """A thing of transformers whose methods have no types."""
    return value
