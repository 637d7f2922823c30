"""What several test files need: the command line run in this process, compressed folders, parts, curvatures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from llmsqueeze.allocation.coded import Curve
from llmsqueeze.allocation.plan import Plan, WeightPlan
from llmsqueeze.cli.app import app
from llmsqueeze.cli.schema.markdown import faults
from llmsqueeze.measure.costs import OCTAVES
from llmsqueeze.measure.shrinkage import Chance, shrink
from llmsqueeze.parts import Affine, Grid
from llmsqueeze.quantizers.curvature import Curvature, factorize

TEXT: dict[str, Any] = {
    "calibration": "demo",
    "samples": 2,
    "seq_len": 32,
}  # enough for every fact that is not about quality
FAST = ["--samples", "2", "--seq-len", "32", "--device", "cpu"]


def thorough(*values: Any) -> Any:
    """Parameters that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.thorough)


# one compressed folder per kind of content; `conftest.compressed` makes each once
KINDS: dict[str, dict[str, Any]] = {
    "portable": {"method": "rtn", "bits": 4, "group_size": 64, "portable": True},
    "native": {"method": "rtn", "bits": 3, "portable": False},
    "widths": {  # three or more, one per fusion group
        "method": "budget",
        "quantizer": "rtn",
        "bits": 3.2,
        "granularity": "group",
        "levels": "integer",
        "group_size": 64,
        "portable": False,
        **TEXT,
    },
    "outliers": {"method": "gwq", "quantizer": "rtn", "bits": 3, **TEXT},
    "rows": {"method": "mixllm", "quantizer": "rtn", "bits": 3, **TEXT},
    "dual": {"method": "dbllm", "quantizer": "rtn"},
    "factors": {"method": "gptq", "bits": 3, "lorc_rank": 4, **TEXT},
    "coded": {"method": "coded", "bits": 2.5, **TEXT},
    "packed": {"method": "gptq", "bits": 3, "pack": "rans", **TEXT},
}


# grids of every kind, with group sizes that divide the columns of a test and that do not, and the whole row
GRIDS = [
    Grid(3, 64, True),
    Grid(4, 24, False),
    Grid(8, 7, False),
    Grid(2, 200, True),
    Grid(3, -1, False),
    Grid(1, 64, True, half=True),
    Grid(3, 100, True, half=True),
    Grid(2, 64, True, dual=True),
    Grid(2, 135, True, dual=True),
    Grid(2, -1, True, dual=True),
]


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `llmsqueeze ARGUMENTS`, run in this process. What `--json` prints fits its model."""
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    if "--json" in words and result.stdout:
        assert faults(json.loads(result.stdout)) == []
    return result.exit_code, result.stdout, result.stderr


def refused(*arguments: object) -> str:
    """stderr of a call that must end with code 2, one message, and no traceback; white space folded."""
    code, out, err = command(*arguments)
    assert code == 2, f"{out}{err}"
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.split())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def correlated_moments(cols: int, generator: torch.Generator, tokens: int = 400) -> Tensor:
    """[cols, cols]: second moments of correlated inputs, so that feedback and refit couple all columns."""
    x = torch.randn(tokens, cols, generator=generator)
    x = x @ (torch.eye(cols) + 0.1 * torch.randn(cols, cols, generator=generator))
    return x.T @ x / tokens


def shrunk_moments(samples: Sequence[Tensor]) -> Tensor:
    """[cols, cols]: the mean of y y^T over all tokens of the samples [tokens, cols], without what is chance in it."""
    every, chance = torch.cat(list(samples)), Chance(samples[0].shape[1], samples[0].dtype, samples[0].device)
    for y in samples:
        chance.add(y, y)
    mean = every.T @ every / len(every)
    return shrink(mean, chance.share(mean.diagonal(), len(every)))


def kept_of_drift(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The share of the mean of (x - y) y^T that is not chance, from samples x, y [tokens, cols]."""
    first = pairs[0][1]
    chance = Chance(first.shape[1], first.dtype, first.device, diagonal=True)
    for x, y in pairs:
        chance.add(x - y, y)
    every = torch.cat([y for _, y in pairs])
    return 1 - chance.share(every.square().mean(dim=0), len(every))


def correlated_curvature(cols: int, generator: torch.Generator) -> Curvature:
    """The curvature of `correlated_moments`."""
    return factorize(correlated_moments(cols, generator))


def random_affine(
    grid: Grid, rows: int, cols: int, generator: torch.Generator, on: Tensor | None = None
) -> tuple[Affine, Tensor]:
    """A random part on all rows, or on those of `on` bool [rows], and its dense form, computed entry by entry."""
    chosen = list(range(rows)) if on is None else on.nonzero()[:, 0].tolist()
    codes = torch.randint(0, grid.max_code + 1, (len(chosen), cols), generator=generator, dtype=torch.uint8)
    scale = torch.randn(len(chosen), grid.groups(cols), generator=generator).to(torch.bfloat16)
    zero = torch.randint(0, grid.max_code + 1, scale.shape, generator=generator, dtype=torch.uint8)
    dense = torch.zeros(rows, cols)
    width = cols if grid.group_size == -1 else grid.group_size
    for i, r in enumerate(chosen):
        for j in range(cols):
            origin = float(zero[i, j // width])
            if grid.symmetric:
                origin = (2**grid.bits - 1) / 2 if grid.half else 2 ** (grid.bits - 1)
            dense[r, j] = float(scale[i, j // width]) * (int(codes[i, j]) - origin)
    return Affine.from_codes(codes, scale, zero, grid, on), dense


def configs() -> dict[str, Any]:
    """One tiny config per way in which decoder blocks differ."""
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        GPT2Config,
        GPTNeoXConfig,
        GraniteConfig,
        LlamaConfig,
        MistralConfig,
        OPTConfig,
        Qwen2Config,
        Qwen3Config,
    )

    common = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}
    rope = {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return {
        "llama": LlamaConfig(**common, **rope),
        "llama-tied": LlamaConfig(**common, **rope, tie_word_embeddings=True),
        "llama-bias": LlamaConfig(**common, **rope, attention_bias=True, mlp_bias=True),
        "mistral-window": MistralConfig(**common, **rope, sliding_window=8),
        "qwen2": Qwen2Config(**common, **rope),
        "qwen3": Qwen3Config(**common, **rope, head_dim=16),
        "gemma2": Gemma2Config(**common, **rope, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
        "gemma3": Gemma3TextConfig(**common, **rope, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
        "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=96, n_positions=64),
        "opt": OPTConfig(**common, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64),
        "granite": GraniteConfig(**common, **rope, residual_multiplier=0.5),
        "neox": GPTNeoXConfig(**common, intermediate_size=96, max_position_embeddings=64),
    }


ARCHITECTURES = [
    name if name in ("llama", "gemma2", "gpt2", "neox") else pytest.param(name, marks=pytest.mark.thorough)
    for name in configs()
]


def coded_curve(shape: tuple[int, int], middle: float, octaves: Sequence[float] = OCTAVES) -> Curve:
    """A curve of coded weights: bits come to none at the binary logarithm `middle`, and steps and tables take the rest;
    a byte anywhere buys the square of the multiplier, whose 24th a weight costs where steps are fine."""
    numel = shape[0] * shape[1]
    at = middle + np.array(octaves)
    bits = 0.5 * np.log2(1 + 4.0 ** (middle - at))
    cost = numel / 24 * 4.0**middle * np.log1p(4.0 ** (at - middle))
    return Curve(at, bits * numel / 8 + sum(shape) + 20, cost, numel)


def coded_plan(shapes: Mapping[str, tuple[int, int]], factor: Mapping[str, float] | None = None) -> Plan:
    """Linears to be coded, with the user's factors."""
    weights = {}
    for name, shape in shapes.items():
        expected = shape[0] * shape[1] * 7 // 8
        planned = WeightPlan(name, shape, torch.bfloat16, "coded", coded_nbytes=expected)
        weights[name] = replace(planned, factor=(factor or {}).get(name, 1.0))
    return Plan(weights)
