"""The tables of llmsqueeze/formats/README.md are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import llmsqueeze
from llmsqueeze import parts
from llmsqueeze.formats import compressed_tensors, native
from llmsqueeze.formats.export import EXPORTS
from llmsqueeze.formats.exports import peft
from llmsqueeze.parts import Affine, Grid, bitpack
from llmsqueeze.parts.coding import frequencies, rans

README = (Path(llmsqueeze.__file__).parent / "formats" / "README.md").read_text()
ROWS, COLS, ON, GROUP = 70, 100, 40, 32
STREAMS = {"words": 50, "tables": 9, "rows_per_stream": 16}
SPECS: list[dict[str, Any]] = [
    {"part": "affine", "bits": 3, "group_size": GROUP, "symmetric": False, "rows": ON},
    {"part": "affine", "bits": 3, "group_size": -1, "symmetric": True, "half": True},
    {"part": "affine", "bits": 3, "group_size": GROUP, "symmetric": True, "streams": STREAMS},
    {"part": "dual_binary", "group_size": GROUP, "rows": ON},
    {"part": "dual_binary", "group_size": GROUP, "streams": STREAMS},
    {"part": "sparse", "count": 7},
    {"part": "lowrank", "rank": 4},
    {"part": "coded", "escapes": 3, **STREAMS},
    {"part": "integers", "escapes": 3},
]


def table(header: str) -> list[list[str]]:
    """The cells of the table with this header, without back quotes."""
    lines = README[README.index(f"| {header}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def described(spec: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The layout that the table gives a part."""
    names = {**spec, **spec.get("streams", {})}
    n, group = spec.get("rows", ROWS), names.get("group_size", -1)
    groups = -(-COLS // group) if group > 0 else 1
    values: dict[str, Any] = {**names, "rows": ROWS, "cols": COLS, "n": n, "packed": bitpack.words, "groups": groups}
    values["spans"] = -(-n // names.get("rows_per_stream", 1))
    kinds = {spec["part"]} | ({"steps", "streams"} if spec["part"] == "coded" else set())
    kinds |= {"streams"} if "streams" in spec else {"steps"} if spec["part"] == "integers" else set()
    conditions = {"": True, "no streams": "streams" not in spec, "rows": "rows" in spec}
    conditions["not symmetric"] = not spec.get("symmetric", True)
    layout = {}
    for part, tensor, dtype, shape, condition in table("part | tensor"):
        if part in kinds and conditions[condition.replace("`", "")]:
            size = tuple(eval(shape, {}, values))
            layout[tensor] = (size, torch.bfloat16 if dtype == "dtype" else getattr(torch, dtype))
    return layout


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tensors_of_every_part(spec: dict[str, Any]) -> None:
    assert described(spec) == parts.layout((ROWS, COLS), {**spec, "dtype": "bfloat16"})


def test_every_part_is_there() -> None:
    assert {spec["part"] for spec in SPECS} == set(parts.PARTS)
    assert all(f"**{kind}**" in README for kind in parts.PARTS)


def test_versions() -> None:
    versions = table("version | adds")
    assert tuple(int(version) for version, _ in versions) == native.FORMAT_VERSIONS
    first = {kind: version for version, adds in reversed(versions) for kind in re.findall(r"\w+", adds)}
    assert all(kind in first for kind in parts.PARTS)


def test_formats_and_numbers() -> None:
    assert [row[0].split("`")[0] for row in table("format | written by")] == [native.METHOD, *EXPORTS]
    part = Affine.from_codes(
        torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1), torch.zeros(2, 1), Grid(4, 32, True)
    )
    assert all(f"`{name.removeprefix('x.')}`" in README for name in compressed_tensors.stored_tensors("x", [part]))
    assert ", ".join(map(str, peft.RANKS[:-1])) + f" or {peft.RANKS[-1]}" in README
    assert rans.SCALE == 2**12
    assert rans.LOWEST == 2**16
    assert frequencies.MANTISSAS.tolist() == [round(2 ** (15 + i / 16)) for i in range(16)]


def test_it_stays_short() -> None:
    words = [word for word in README.split() if re.search(r"\w", word)]
    assert len(words) < 1000
