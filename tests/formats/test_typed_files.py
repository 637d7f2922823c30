"""Record and plan: each field has its type and range, and what has not is named with its file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import KINDS

from llmsqueeze.allocation.plan_yaml import read_plan
from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.files import SIDECAR
from llmsqueeze.formats.record import read_record

PLAN: dict[str, Any] = {
    "llmsqueeze_plan": 1,
    "profile": "profile.safetensors",
    "recipe": {"method": "rtn", "bits": 3},
    "weights": {"model.layers.0.mlp.up_proj": "3 bit g128"},
}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"nbytes": "12"}, "nbytes is '12'"),
        ({"nbytes": -1}, "nbytes is -1"),
        ({"nbytes": True}, "nbytes is True"),
        ({"bits_per_weight": 10**400}, "bits_per_weight is 1000"),
        ({"errors": {"model.x": []}}, "errors.model.x is []"),
        ({"towers": [3]}, "towers.0 is 3"),
        ({"calibration": {"samples": "many"}}, "calibration.samples is 'many'"),
        ({"distillation": ["x"]}, "distillation.0 is 'x'"),
        ({"recipe": {"bits": [[]]}}, "recipe.bits is [[]]"),
        ({"recipe": {"method": {}}}, "recipe.method is {}"),
        ({"experts_stored_as": {"a": [["b.{:99999999999}.c", 1]]}}, "experts_stored_as.a.0.0 is 'b.{:9"),
        ({"experts_stored_as": {"a": [["b.{}.c", -1]]}}, "experts_stored_as.a.0.1 is -1"),
    ],
)
def test_a_field_of_a_record_is_named(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    (tmp_path / SIDECAR).write_text(json.dumps({"model": "demo", "bits_per_weight": 3, **change}))
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / SIDECAR}': {field}")):
        read_record(tmp_path)


def test_records_hold_what_other_versions_write(tmp_path: Path) -> None:
    known: dict[str, Any] = {"model": "demo", "recipe": {**KINDS["native"], "new_option": [1]}, "new": {"a": None}}
    (tmp_path / SIDECAR).write_text(json.dumps(known))
    assert read_record(tmp_path) == known


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weights": []}, "weights is []"),
        ({"weights": {}}, "weights is {}"),
        ({"weights": {3: "3 bit g128"}}, "weights.3.[key] is 3"),
        ({"recipe": {"bits": "x"}}, "recipe: --bits is 'x'"),
        ({"profile": 3}, "profile is 3"),
        ({"profile": "../profile.safetensors"}, "profile is '../profile.safetensors'; it must be a file in the folder"),
        ({"weights_sha256": ["x"]}, "weights_sha256 is ['x']"),
    ],
)
def test_a_field_of_a_plan_is_named(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(PLAN | change))
    with pytest.raises(RecipeError, match=re.escape(f"{file}': {field}")):
        read_plan(file)


def test_a_plan_is_read(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    assert read_plan(tmp_path / "plan.yaml").profile == tmp_path / "profile.safetensors"
