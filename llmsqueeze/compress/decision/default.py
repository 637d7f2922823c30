"""What a run becomes that names no method and no size: as many bits as fit the memory at hand.

    descent with 4 bits, else with 3, if the result takes at most ROOM of the memory of the device; else coded, of that
    size, or 3 bits if not even that is possible

The memory is all that the device or the machine has, not what is free at the moment: the same command gives the same
result, and goes on with what a killed run has done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmsqueeze.compress.job import Job, open_job
from llmsqueeze.errors import RecipeError
from llmsqueeze.formats.imports.quantized import gguf_file
from llmsqueeze.memory import total_on
from llmsqueeze.model.original import Source
from llmsqueeze.progress import Progress
from llmsqueeze.recipe.resolve import make_recipe

ROOM = 0.6  # of the memory; the rest is for what a model computes, and for other programs
WIDTHS = (4, 3)
SMALLER = "--bits 3 takes fewer bytes, --for smallest the fewest, --size 2GB a size"
LARGER = "--bits 4 keeps more, --for smallest takes the fewest bytes, --size 2GB a size"


def default(source: Source, settings: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Any], str]:
    """The settings that are added to `settings`, and a note that says what was chosen and what would choose otherwise.

    Raises what opening the model raises.
    """
    if source.from_quantized or gguf_file(Path(source.model).expanduser()) is not None:
        return {"bits": 3}, f"no method and no size are named: descent with 3 bits; {LARGER}"
    job = open_job(source, make_recipe(settings), Progress(), text=False, device=device)
    return chosen(job, settings, total_on(device))


def chosen(job: Job, settings: Mapping[str, Any], memory: int | None) -> tuple[dict[str, Any], str]:
    """`default` for a model that is open and so many bytes of memory; None if nobody knows how many."""
    room = math.inf if memory is None else int(ROOM * memory)
    plans = {width: job.asking(replace(job.recipe, bits=width)).plan for width in WIDTHS}
    sizes = {width: job.kept_nbytes + plan.nbytes for width, plan in plans.items()}
    begins = "no method and no size are named: "
    for width, nbytes in sizes.items():
        if nbytes <= room:
            fits = "" if memory is None else f", {nbytes / 1e9:.2g} GB for {memory / 1e9:.3g} GB of memory"
            return {"bits": width}, f"{begins}descent with {width} bits{fits}; {SMALLER if width > 3 else LARGER}"
    assert memory is not None, "without a limit the first fits"
    smaller = {"method": "coded", "size": room}
    why = f"3 bits take {sizes[3] / 1e9:.3g} GB, and the memory is {memory / 1e9:.3g} GB"
    try:
        job.asking(make_recipe({**settings, **smaller})).target()
    except RecipeError:
        return {"bits": 3}, f"{begins}descent with 3 bits, though {why}; --method coded with --size goes lower"
    return smaller, f"{begins}coded, {room / 1e9:.3g} GB: {why}; --bits 3 for descent with 3 bits, which others open"
