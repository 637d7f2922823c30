"""The file of a profile: comes back exactly, is refused if damaged, and says what it lacks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmsqueeze.errors import CheckpointError, RecipeError
from llmsqueeze.measure import profile as profiles
from llmsqueeze.measure.costs import Option
from llmsqueeze.measure.outliers import Candidates
from llmsqueeze.measure.profile import Profile
from llmsqueeze.measure.request import Request
from llmsqueeze.parts import Grid

NOTHING = Request()
PRICED = (Option(Grid(2, 64, True, True)), Option(Grid(4, 128, False)), Option(Grid(3, 64, True), 0.02))


@pytest.fixture
def full(generator: torch.Generator) -> Profile:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.costs")
    return Profile(
        loss=1.2345678901234567,
        labels=77,
        options=PRICED,
        salience_widths=(4, 3),
        costs={name: torch.rand(3, 5, generator=generator) for name in names},
        row_gradient={name: torch.rand(5, generator=generator) for name in names},
        gains={names[0]: torch.rand(3, 2, generator=generator)},
        rates={names[0]: torch.rand(3, generator=generator).double()},
        curves={names[1]: torch.rand(3, 7, generator=generator).double()},
        moments={"model.embed_tokens": torch.rand(4, 4, generator=generator)},
        salience={name: torch.rand(2, 5, generator=generator) for name in names},
        candidates={names[0]: Candidates(torch.tensor([7, 3], dtype=torch.int32), torch.tensor([0.5, 0.25]))},
        lim=(-0.1, -1 / 3),
        zd=(0.15, 1e-17),
        groups=(names, ("x",)),
        source={"weights": "ab" * 32, "files": {"a": {"size": 3}}, "seed": 0, "labels": "text", "skip": ["*.o_proj"]},
    )


def test_a_profile_comes_back_exactly(full: Profile, tmp_path: Path) -> None:
    profiles.save(full, tmp_path / "p.safetensors")
    again = profiles.load(tmp_path / "p.safetensors")
    for field in (one.name for one in profiles.IN_JSON):
        assert getattr(again, field) == getattr(full, field), field
    for field in (one.name for one in profiles.STORED):
        before, after = getattr(full, field), getattr(again, field)
        assert before.keys() == after.keys(), field
        assert all(torch.equal(before[name], after[name]) for name in before), field
    assert again.candidates.keys() == full.candidates.keys()
    for name, candidates in full.candidates.items():
        assert torch.equal(again.candidates[name].index, candidates.index)
        assert torch.equal(again.candidates[name].score, candidates.score)


def test_an_empty_profile_comes_back(tmp_path: Path) -> None:
    profiles.save(Profile(), tmp_path / "p.safetensors")
    assert profiles.load(tmp_path / "p.safetensors") == Profile()


def rewritten(full: Profile, path: Path, about: Any) -> Path:
    """A profile file whose JSON is something else."""
    profiles.save(full, path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        old = json.loads(file.metadata()["llmsqueeze_profile"])
    save_file(tensors, path, {"llmsqueeze_profile": about(old) if callable(about) else about})
    return path


DAMAGED = {
    "another version": lambda old: json.dumps(old | {"version": 99}),
    "broken JSON": "{",
    "no mapping": "[]",
    "a field gone": lambda old: json.dumps({k: v for k, v in old.items() if k != "options"}),
    "options of another form": lambda old: json.dumps(old | {"options": [3]}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_profile_is_refused(damage: str, full: Profile, tmp_path: Path) -> None:
    path = rewritten(full, tmp_path / "p.safetensors", DAMAGED[damage])
    with pytest.raises(CheckpointError, match=r"p\.safetensors"):
        profiles.load(path)


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, demo_dir: Path) -> None:
    (tmp_path / "p.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match="damaged or no profile"):
        profiles.load(tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        profiles.load(demo_dir / "model.safetensors")
    with pytest.raises(CheckpointError):
        profiles.load(tmp_path)
    with pytest.raises(RecipeError, match="`llmsqueeze plan` writes one"):
        profiles.load(tmp_path / "none.safetensors")


def test_a_cut_profile_is_refused(full: Profile, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    profiles.save(full, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError):
        profiles.load(path)


def test_a_profile_says_what_it_lacks(full: Profile, tmp_path: Path) -> None:
    profiles.save(full, tmp_path / "p.safetensors")
    again = profiles.load(tmp_path / "p.safetensors")
    source, priced = dict(full.source), Request(PRICED)

    def missing(changed: dict[str, Any], request: Request = NOTHING) -> str | None:
        return profiles.lacks(again, source | changed, request)

    assert missing({}, priced) is None
    assert missing({"seed": 5}, priced) == "seed 0, not 5"
    assert missing({"labels": "model"}) == "labels text, not model"
    assert missing({"weights": "cd" * 32}) == f"weights {'ab' * 6}..., not {'cd' * 6}..."
    assert missing({"new_setting": 1}) == "new setting None, not 1"
    assert missing({}, Request((*PRICED, Option(Grid(8, 64, True, True))))) == "no costs for 8 bit g64 half"
    assert missing({}, Request(salience=(Grid(3, 64), Grid(2, 64)))) == "no salience at 2 bits"
    assert missing({}, Request(gains=True, rates=True, coded=True)) is None
    assert profiles.lacks(Profile(), {}, Request(gains=True)) == "no gains of ranks"
    assert profiles.lacks(Profile(), {}, Request(rates=True)) == "no rates of entropy-coded codes"
    assert profiles.lacks(Profile(), {}, Request(coded=True)) == "no costs of coded weights"
    assert profiles.lacks(Profile(), {}, Request(lim=True)) == "no LIM"
    assert profiles.lacks(Profile(), {}, Request(zd=True)) == "no ZD"


def test_when_the_files_were_read_does_not_matter(full: Profile) -> None:
    """Their contents do, by the digest of all of them."""
    touched = dict(full.source) | {"files": {"a": {"size": 3, "mtime_ns": 7}}}
    assert profiles.lacks(full, touched, Request()) is None


def test_profiles_of_blocks_join_in_turn(generator: torch.Generator) -> None:
    first, second = torch.rand(3, generator=generator), torch.rand(3, generator=generator)
    blocks = [
        Profile(costs={"a": first}, zd=(0.1,), groups=(("a",),)),
        Profile(costs={"b": second}, zd=(0.2,), groups=(("b",), ("c", "d"))),
    ]
    whole = profiles.joined(blocks)
    assert whole.costs == {"a": first, "b": second}
    assert whole.zd == (0.1, 0.2)
    assert whole.groups == (("a",), ("b",), ("c", "d"))
    assert whole.gains == {}
    assert profiles.joined([]) == Profile()
    assert blocks[0].costs == {"a": first}, "what is joined is not changed"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": "77"}, "labels is '77'"),
        ({"loss": float("nan")}, "loss is nan"),
        ({"options": [[[2, 64, True, True], 0.0]]}, "options.0.0"),
        ({"options": [[[99, 64, True, True, False], 0.0]]}, "options.0.0.0 is 99"),
        ({"salience_widths": [4, 3, 2]}, "salience is [2, 5]"),
        ({"source": {"files": []}}, "source.files is []"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(change: dict[str, Any], said: str, full: Profile, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    profiles.save(full, file)
    with safe_open(file, framework="pt") as stored:
        about = json.loads(stored.metadata()["llmsqueeze_profile"]) | change
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
    save_file(tensors, file, {"llmsqueeze_profile": json.dumps(about)})
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        profiles.load(file)
    assert str(file) in str(error.value)


def test_a_profile_of_other_shapes_is_told(full: Profile) -> None:
    name = "model.layers.0.self_attn.q_proj"
    assert profiles.misfit(full, {name: (5, 4), "another": (1, 1)}) is None
    assert "is of 5 rows, the linear has 6" in str(profiles.misfit(full, {name: (6, 4)}))
    assert "does not have" in str(profiles.misfit(full, {name: (5, 1)}))


def test_a_flipped_byte_of_a_profile_is_found(full: Profile, tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    profiles.save(full, file)
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="is not what was written"):
        profiles.load(file)
