"""The fingerprint of a run: all that decides its bits. A run goes on with the journal of one with the same fingerprint.

The number of threads is not in it: with another one, torch may add in another order, and the last bits can differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmsqueeze import __version__
from llmsqueeze.compress.decision.decide import Decision
from llmsqueeze.compress.job import Job
from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import read_json
from llmsqueeze.formats.folder import digest
from llmsqueeze.journal import ABOUT, FOLDER
from llmsqueeze.journal.partial import partial_of
from llmsqueeze.measure.profile import Profile
from llmsqueeze.model.checkpoint import weights_digest
from llmsqueeze.parallel import processes

PRODUCTS = ("float32", "bfloat16")


def fingerprint(job: Job, decision: Decision | None, profile: Profile | None, verify: bool) -> dict[str, Any]:
    """The fingerprint of a run, as JSON. decision, profile: those of an earlier run that it begins with."""
    return {
        "weights": weights_digest(job.digests()),
        "config": _sha256(job.checkpoint.config),
        "calibration": None if job.calibration is None else job.calibration.sha256,
        "held back": None if job.calibration is None else _tensors_sha256(dict(enumerate(job.calibration.held_back))),
        "recipe": job.recipe.as_dict(),
        "plan": None if decision is None else _sha256([str(decision.plan), _tensors_sha256(decision.chosen)]),
        "profile": None if profile is None else _sha256(profile.source),
        "verify": verify,
        "device": str(job.device),
        "processes": processes.count(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of what changes numbers."""
    from importlib.metadata import version

    others = {name: version(name) for name in ("numba", "numpy", "transformers")}
    return {"llmsqueeze": __version__, "torch": torch.__version__, **others}


def earlier_products(out: Path) -> str | None:
    """The dtype of the products that a run which left a journal for `out` chose: a trial may choose another today."""
    try:
        products = read_json(partial_of(out) / FOLDER / ABOUT)["recipe"]["products"]
    except (CheckpointError, KeyError, TypeError):
        return None
    return products if products in PRODUCTS else None


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _tensors_sha256(tensors: Mapping[Any, Tensor]) -> str:
    return _sha256({str(name): digest(tensor).hex() for name, tensor in tensors.items()})
