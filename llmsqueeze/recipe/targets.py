"""What `--for` implies: settings by what is to open the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmsqueeze.recipe.conflicts import phrase
from llmsqueeze.recipe.methods import BUDGETS


@dataclass(frozen=True)
class Target:
    """A program, or the wish for the fewest bytes. implies: what is set if nobody asks otherwise; allows: option -> the
    only values that it may have; why: the reason."""

    implies: Mapping[str, Any]
    allows: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    why: str = ""


TARGETS = {
    "transformers": Target({"portable": True}, {"portable": (True,)}, "stock transformers open compressed-tensors"),
    "vllm": Target({"portable": True}, {"portable": (True,)}, "vLLM opens compressed-tensors"),
    "llama.cpp": Target(
        {"portable": True, "method": "descent", "bits": 4, "group_size": 32},
        {
            "portable": (True,),
            "method": ("descent", "gptq", "rtn"),
            "bits": (4, 5, 8),
            "group_size": (32, 64, 128, 256),
        },
        "export --to gguf holds codes of 4, 5 or 8 bits, in groups of 32 or more",
    ),
    "smallest": Target(
        {"method": "coded", "bits": 3, "code_embeddings": True},
        {"method": ("coded",), "portable": (False,)},
        "that is coded",
    ),
}


def with_target(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were asked for, and those that `--for` implies in their place."""
    if (target := TARGETS.get(given.get("target", ""))) is None:
        return dict(given)
    implied = dict(target.implies)
    if any(name in given for name in BUDGETS):
        implied.pop("bits", None)
    if "embeddings" in given:
        implied.pop("code_embeddings", None)
    return {**implied, **{name: value for name, value in given.items() if name != "target"}}


def against_target(given: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for every option that contradicts `--for`."""
    name = given.get("target", "")
    if (target := TARGETS.get(name)) is None:
        return
    for option, allowed in target.allows.items():
        if option in given and given[option] not in allowed:
            yield f"{phrase(given, option)} contradicts --for {name}: {target.why}"
    if name == "llama.cpp":
        for option in (one for one in ("size", "max_ppl_increase", "max_kl") if one in given):
            yield f"{phrase(given, option)} contradicts --for {name}: {target.why}"
