"""Causal attention over few tokens on a CPU, which leaves out most of what the mask hides.

torch's kernel for CPUs takes the keys in blocks of 512, and computes a whole block for every query that sees any of it.
So with up to 512 tokens a causal attention takes as long as one without a mask. Some queries at a time, with the keys
up to the last of them, take two thirds of that in the forward and in the backward pass; with more than 1024 tokens
there is no gain. The sums are the same, in another order. Memory: a mask [tokens, tokens].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

QUERIES = 64  # at a time
MOST_TOKENS = 1024
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class AttentionInPieces(TorchFunctionMode):
    """In the context `scaled_dot_product_attention` computes attention over few tokens as above."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is scaled_dot_product_attention and (call := AttentionCall(*args, **kwargs)).is_causal_over_few:
            return in_pieces(call, partial(scaled_dot_product_attention, enable_gqa=call.enable_gqa))
        return function(*args, **kwargs)


def traced_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """In the place of `aten._scaled_dot_product_flash_attention_for_cpu` in a trace that uses only its first result."""
    call = AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale)
    if call.is_causal_over_few:
        return (in_pieces(call, lambda *tensors, **settings: ATTENTION(*tensors, **settings)[0]),)
    result: tuple[Tensor, ...] = ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    return result


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of `scaled_dot_product_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def is_causal_over_few(self) -> bool:
        tokens = self.query.shape[-2]
        return (
            self.is_causal
            and self.attn_mask is None
            and not self.dropout_p
            and type(self.query) is Tensor  # no tensor without data
            and self.query.device.type == "cpu"
            and self.query.dtype == torch.float32
            and tokens == self.key.shape[-2]
            and QUERIES < tokens <= MOST_TOKENS
            and self.query.shape[:-2].numel() >= torch.get_num_threads()  # else a piece has too few tasks for them
        )


def in_pieces(call: AttentionCall, compute: Callable[..., Tensor]) -> Tensor:
    """[..., heads, tokens, width], laid out like the query, as torch's kernel does it: `compute` of some queries after
    the other."""
    tokens = call.query.shape[-2]
    hidden = _hidden(tokens)
    by_token = call.query.stride(-2) > call.query.stride(-3)
    outputs = []
    for start in range(0, tokens, QUERIES):
        stop = min(start + QUERIES, tokens)
        tensors = call.query[..., start:stop, :], call.key[..., :stop, :], call.value[..., :stop, :]
        output = compute(*tensors, attn_mask=hidden[start:stop, :stop], scale=call.scale)
        outputs.append(output.transpose(-3, -2) if by_token else output)
    return torch.cat(outputs, dim=-3).transpose(-3, -2) if by_token else torch.cat(outputs, dim=-2)


@lru_cache(maxsize=2)
def _hidden(tokens: int) -> Tensor:
    """float32 [tokens, tokens]: added to the products of queries and keys; -inf hides a key."""
    with torch.inference_mode(False):  # it must also serve runs with gradients
        return torch.full((tokens, tokens), float("-inf")).triu_(1)
