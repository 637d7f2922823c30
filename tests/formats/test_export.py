"""Exports: what stock transformers opens without us computes the same, and what would be lost is refused."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import llmsqueeze
from llmsqueeze import parts
from llmsqueeze.allocation.plan import Rows, why_native
from llmsqueeze.cli.app import app
from llmsqueeze.compress.blocks import quantize
from llmsqueeze.compress.decide import Decision, decide, request_of, target_nbytes
from llmsqueeze.compress.job import Job, prepare
from llmsqueeze.distillation.distill import distill
from llmsqueeze.distillation.settings import make_distillation
from llmsqueeze.errors import RecipeError, UnsupportedError
from llmsqueeze.formats import compressed_tensors
from llmsqueeze.formats.entries import read_entries, read_parts
from llmsqueeze.formats.export import export
from llmsqueeze.measure.sweeps import measure
from llmsqueeze.model.activations import Spill
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.original import Source
from llmsqueeze.model.walk import Walk
from llmsqueeze.parts import Affine, Grid, bitpack
from llmsqueeze.progress import Progress
from llmsqueeze.publish.card import model_card
from llmsqueeze.publish.show import contents
from llmsqueeze.recipe.recipe import Recipe
from llmsqueeze.recipe.resolve import make_recipe

pytest.importorskip("compressed_tensors")

TEXT = {"samples": 6, "seq_len": 64}
# stands where llmsqueeze would be found, so that importing it fails
STOCK = """
import sys, json
sys.modules["llmsqueeze"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    torch.save(model(input_ids=tokens).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several widths, one per fusion group."""
    out = tmp_path_factory.mktemp("native") / "native"
    recipe = {"method": "budget", "bits": 3.2, "granularity": "group", "levels": "integer", "group_size": 64, **TEXT}
    quantize("demo", make_recipe({**recipe, "portable": False}), out)
    return out


@pytest.fixture(scope="module")
def portable(native: Path) -> Path:
    out = native.with_name("portable")
    export(str(native), "compressed-tensors", out)
    return out


def logits_of_stock(folder: Path, tokens: torch.Tensor, scratch: Path) -> torch.Tensor:
    """In a process of its own, in which llmsqueeze cannot be imported."""
    made = scratch / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", STOCK, str(folder), json.dumps(tokens.tolist()), str(made)],
        check=True,
        capture_output=True,
        cwd=scratch,
    )
    return torch.load(made)


def tokens() -> torch.Tensor:
    return torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))


def test_stock_transformers_computes_what_the_parts_do(native: Path, portable: Path, tmp_path: Path) -> None:
    widths = {spec["bits"] for entry in read_entries(open_checkpoint(native)).values() for spec in entry.specs}
    assert len(widths) > 2, "one config group would hide what mixed ones do"
    ours = llmsqueeze.load(str(native), dtype=torch.float32)
    with torch.no_grad():
        expected = ours(input_ids=tokens()).logits
    assert torch.allclose(logits_of_stock(portable, tokens(), tmp_path), expected, atol=1e-4)


@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_width_is_unpacked_by_the_library_as_by_us(bits: int, size: int, generator: torch.Generator) -> None:
    """compressed-tensors' own unpacking of our bytes, with scales of either sign."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    grid = Grid(bits, size, symmetric=True)
    codes = torch.randint(0, grid.max_code + 1, (6, 96), generator=generator).to(torch.uint8)
    scale = torch.randn(6, grid.groups(96), generator=generator)
    part = Affine.from_codes(codes, scale, torch.zeros_like(scale), grid)
    stored = compressed_tensors.stored_tensors("x", [part])
    assert set(stored) == {"x.weight_packed", "x.weight_scale", "x.weight_shape"}
    assert stored["x.weight_shape"].tolist() == [6, 96]
    assert stored["x.weight_packed"].shape == (6, bitpack.words(96, bits))
    signed = unpack_from_int32(stored["x.weight_packed"], bits, torch.Size([6, 96]))
    assert torch.equal(signed.int() + 2 ** (bits - 1), codes.int())
    width = grid.width(96)
    assert torch.equal(part.dense(), signed.float() * scale.repeat_interleave(width, dim=1))


@pytest.mark.parametrize(
    ("bits", "golden"),
    [
        (2, "e4e4e4e4e4e4e4e4"),
        (3, "88c6fa88c6fa88c6fa88c6fa"),
        (4, "10325476981032547698103254769810"),
        (5, "20886252a4100c4562942831869021a418838a52"),
    ],
)
def test_golden_bytes(bits: int, golden: str) -> None:
    """Codes 0, 1, 2 ... over one row of 32, as the bytes have to lie in the file."""
    top = {2: 4, 3: 8, 4: 10, 5: 32}[bits]
    codes = (torch.arange(32) % top).to(torch.uint8)[None]
    bit_string = "".join(format(int(code), f"0{bits}b")[::-1] for code in codes[0])
    slow = bytes(int(bit_string[i : i + 8][::-1], 2) for i in range(0, len(bit_string), 8)).hex()
    packed = bitpack.pack(codes, bits).view(torch.uint8).flatten()
    assert bytes(packed.tolist()).hex() == slow
    if bits != 5:
        assert slow == golden


def test_a_folder_of_several_widths_is_not_read_as_if_it_had_one(tmp_path: Path) -> None:
    """transformers 5.23 reads all but the first width wrongly then, and says nothing."""
    from transformers import CompressedTensorsConfig

    settings = {"method": "layerwise", "quantizer": "rtn", "importance": "first", "bits": 3, "group_size": 64}
    assert quantize("demo", make_recipe(settings), tmp_path / "out").format == "compressed-tensors"
    with pytest.raises(UnsupportedError, match="CompressedTensorsConfig"):
        llmsqueeze.load(str(tmp_path / "out"), quantization_config=CompressedTensorsConfig(dequantize=True))


def test_the_config_names_every_module_and_ignores_the_rest(portable: Path) -> None:
    config = open_checkpoint(portable).config["quantization_config"]
    named = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert len(named) == len(set(named)) == 28
    assert not any(name in ("Linear",) or name.startswith("re:") for name in named)
    assert config["ignore"] == ["lm_head"]
    grids = [(g["weights"]["num_bits"], g["weights"]["group_size"]) for g in config["config_groups"].values()]
    assert len(grids) == len(set(grids)), "one group per width and group size"
    assert all(group["weights"]["symmetric"] for group in config["config_groups"].values())


def test_nothing_is_rounded_again(native: Path, portable: Path) -> None:
    before, after = open_checkpoint(native), open_checkpoint(portable)
    for name, entry in read_entries(before).items():
        ours = parts.sum_of_parts(read_parts(before, entry))
        assert torch.equal(ours, parts.sum_of_parts(read_parts(after, read_entries(after)[name])))
    kept = [name for name in before.tensors if ".parts." not in name]
    assert kept
    assert all(torch.equal(before.read(name), after.read(name)) for name in kept)


def test_portable_writes_what_an_export_would(tmp_path: Path) -> None:
    settings = {"method": "descent", "bits": 3, "group_size": 64, **TEXT}
    quantize("demo", make_recipe({**settings, "portable": False}), tmp_path / "native")
    export(str(tmp_path / "native"), "compressed-tensors", tmp_path / "exported")
    summary = quantize("demo", make_recipe({**settings, "portable": True}), tmp_path / "portable")
    exported, direct = open_checkpoint(tmp_path / "exported"), open_checkpoint(tmp_path / "portable")
    assert exported.config == direct.config
    assert set(exported.tensors) == set(direct.tensors)
    assert all(torch.equal(exported.read_raw(name), direct.read_raw(name)) for name in exported.tensors)
    assert summary.nbytes == direct.nbytes == contents(str(tmp_path / "portable")).nbytes
    assert json.loads((tmp_path / "portable" / "llmsqueeze.json").read_text())["format"] == "compressed-tensors"


def test_a_portable_budget_counts_the_shapes(tmp_path: Path) -> None:
    recipe = make_recipe({"method": "budget", "size": "450kB", "portable": True, "group_size": 64, **TEXT})
    summary = quantize("demo", recipe, tmp_path / "out")
    on_disk = open_checkpoint(tmp_path / "out").nbytes
    assert 440_000 < summary.nbytes == on_disk <= 450_000


def test_the_card_of_a_portable_folder_needs_no_import(portable: Path, native: Path) -> None:
    assert "import llmsqueeze.hf" in model_card(native)
    card = model_card(portable)
    assert "import llmsqueeze.hf" not in card
    assert "RANDOM VALUES" not in card
    assert card.index("AutoModelForCausalLM.from_pretrained") < card.index("llmsqueeze.load")
    assert "vllm serve" in card


def test_what_is_portable_is_distilled_and_stays_so(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    quantize("demo", make_recipe({"method": "rtn", "bits": 2, "portable": True}), source)
    settings = {"steps": 8, "samples": 16, "held_back": 3, "batch_size": 2, "seq_len": 32}
    summary = distill(str(source), "demo", make_distillation(settings), out)
    assert summary["best_step"] > 0
    assert summary["kl_after"] < summary["kl_before"]
    before, after = open_checkpoint(source), open_checkpoint(out)
    assert after.config == before.config
    held = [{n: (t.shape, t.dtype) for n, t in one.tensors.items()} for one in (before, after)]
    assert held[0] == held[1]
    changed = {name for name in before.tensors if not torch.equal(before.read_raw(name), after.read_raw(name))}
    assert changed
    assert all(name.endswith((".weight_scale", "norm.weight")) for name in changed), "shapes and codes stay"
    with torch.no_grad():
        expected = llmsqueeze.load(str(out), dtype=torch.float32)(input_ids=tokens()).logits
    assert torch.allclose(logits_of_stock(out, tokens(), tmp_path), expected, atol=1e-4)
    assert make_recipe({"bits": 3, "portable": True, "distill_steps": 5}).portable, "nor do they contradict"


def test_transposed_weights_are_refused_before_anything_is_read(random_model, tmp_path: Path) -> None:
    recipe = make_recipe({"method": "rtn", "bits": 4, "group_size": 16, "portable": True})
    with pytest.raises(RecipeError, match="transposed"):
        quantize(str(random_model("gpt2")), recipe, tmp_path / "out")


def test_show_counts_the_same_and_the_shapes(native: Path, portable: Path) -> None:
    before, after = contents(str(native)), contents(str(portable))
    assert after.nbytes == before.nbytes + 16 * 28
    assert sorted(row.parts for row in after.rows) == sorted(row.parts for row in before.rows)
    assert json.loads((portable / "llmsqueeze.json").read_text())["bits_per_weight"] == round(after.bits_per_weight, 6)


@pytest.mark.parametrize("settings", [{"bits": 3}, {"method": "dbllm"}, {"method": "gwq", "bits": 3, "lorc_rank": 2}])
def test_dense_is_the_sum_of_the_parts(settings: dict, tmp_path: Path) -> None:
    quantize("demo", make_recipe({**settings, **TEXT}), tmp_path / "in")
    export(str(tmp_path / "in"), "dense", tmp_path / "out", dtype="fp32")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert "quantization_config" not in checkpoint.config
    before = open_checkpoint(tmp_path / "in")
    for name, entry in read_entries(before).items():
        assert torch.equal(checkpoint.read(f"{name}.weight"), parts.sum_of_parts(read_parts(before, entry)))
    ours = llmsqueeze.load(str(tmp_path / "in"), dtype=torch.float32)
    with torch.no_grad():
        expected = ours(input_ids=tokens()).logits
    assert torch.allclose(logits_of_stock(tmp_path / "out", tokens(), tmp_path), expected, atol=1e-4)


def test_transposed_weights_are_written_as_their_modules_store_them(random_model, tmp_path: Path) -> None:
    original = random_model("gpt2")
    quantize(str(original), make_recipe({"method": "rtn", "bits": 4, "group_size": 16}), tmp_path / "in")
    export(str(tmp_path / "in"), "dense", tmp_path / "out")
    ids = tokens() % 96
    with torch.no_grad():
        ours = llmsqueeze.load(str(tmp_path / "in"))(input_ids=ids).logits
        dense = llmsqueeze.load(str(tmp_path / "out"))(input_ids=ids).logits
    assert torch.allclose(ours, dense, atol=1e-5)
    with pytest.raises(UnsupportedError, match="transposed"):
        export(str(tmp_path / "in"), "compressed-tensors", tmp_path / "portable")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"method": "dbllm"}, "dual-binary planes"),
        ({"method": "gwq", "bits": 3}, "outliers"),
        ({"bits": 3, "lorc_rank": 2}, "a low-rank part"),
        ({"bits": 2, "levels": "half"}, "half-integer levels"),
        ({"bits": 3, "symmetric": False}, "zeros"),
        ({"bits": 3, "group_size": 100}, "a short last group"),
        ({"method": "mixllm", "quantizer": "rtn", "importance": "random"}, "rows on several grids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_be_lost_is_named(settings: dict, what: str, tmp_path: Path) -> None:
    quantize("demo", make_recipe({**settings, "samples": 2, "seq_len": 32}), tmp_path / "in")
    with pytest.raises(UnsupportedError, match=what):
        export(str(tmp_path / "in"), "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_wishes_are_refused(native: Path, demo_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown format 'dens'; did you mean 'dense'"):
        export(str(native), "dens", tmp_path / "out")
    with pytest.raises(RecipeError, match="--dtype bf16 applies to --to dense"):
        export(str(native), "compressed-tensors", tmp_path / "out", dtype="bf16")
    with pytest.raises(UnsupportedError, match="was not compressed by llmsqueeze"):
        export(str(demo_dir), "dense", tmp_path / "out")
    with pytest.raises(RecipeError, match="is no folder"):
        export(str(tmp_path / "nowhere"), "dense", tmp_path / "out")


def test_the_command(native: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", str(native), "--to", "dense", "--out", str(out), "--json", "-q"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["target"] == "dense"
    assert (out / "tokenizer.json").exists()
    again = CliRunner().invoke(app, ["export", str(native), "--to", "dense", "--out", str(out), "-q"])
    assert again.exit_code == 2
    assert "exists already" in again.stderr


# ---------------------------------------------------------------------------------------------- portable by default


def planned(settings: dict, model: str = "demo") -> tuple[Job, Recipe]:
    recipe = make_recipe(settings)
    return prepare(Source(model), recipe, Progress(), text=False), recipe


AUTO = {"method": "budget", "bits": 3.5, "granularity": "group", "levels": "integer"}
WHERE_POSSIBLE = [
    {},
    {"method": "rtn", "bits": 8},
    {"method": "gptq", "bits": 2, "group_size": -1},
    {"group_size": 32},
    {"group_size": 1000},  # which is whole rows here
    {"method": "layerwise", "bits": 3.2},
    {"skip": ["down_proj"]},
    AUTO,
    {**AUTO, "group_sizes": [32, 64, -1]},
    {"method": "budget", "size": "450kB", "portable": True},
]
NATIVE_BECAUSE = [
    ({"method": "gwq"}, "method gwq: no other runtime opens outliers"),
    ({**AUTO, "outliers": 0.01}, "outliers: no other runtime opens outliers"),
    ({**AUTO, "row_outliers": [0.01]}, "outliers: no other runtime opens outliers"),
    ({"method": "dbllm"}, ": no other runtime opens two planes"),
    ({**AUTO, "dual": True}, "dual: no other runtime opens two planes"),
    ({"method": "mixllm"}, "method mixllm: runtimes want one width per fusion group"),
    ({"bits": 2.5, "granularity": "row"}, "per row: runtimes want one width per fusion group"),
    ({**AUTO, "granularity": "linear"}, "per linear: runtimes want one width per fusion group"),
    ({"lorc_rank": 4}, "lorc rank 4: the low-rank factors need an adapter beside the model"),
    ({**AUTO, "lorc_rank": "auto"}, "lorc rank auto: the low-rank factors need an adapter beside the model"),
    ({"levels": "half"}, "levels half: compressed-tensors has integer levels"),
    ({**AUTO, "levels": "by-width"}, "levels by-width: compressed-tensors has integer levels"),
    ({"symmetric": False}, "asymmetric: transformers does not open zeros"),
    ({"method": "layerwise", "low_bits": 1}, "compressed-tensors has 2 to 8"),
    (
        {"method": "descent", "group_size": 100},
        "group size 100: it does not divide the 128 columns of ",
    ),
    (
        {"method": "descent", "group_size": 256},
        "group size 256: it does not divide the 384 columns of ",
    ),
    ({**AUTO, "group_sizes": [64, 96]}, "group size 96: it does not divide the 128 columns"),
]


@pytest.mark.parametrize("settings", WHERE_POSSIBLE, ids=str)
def test_what_has_a_place_there_is_portable(settings: dict) -> None:
    job, recipe = planned(settings)
    assert job.plan.portable
    assert why_native(recipe, job.skeleton, job.plan.weights) is None
    entries = [(weight.shape, weight.specs) for weight in job.plan.weights.values()]
    assert not any(compressed_tensors.lost(*entry) for entry in entries)
    native, recipe = planned({**settings, "portable": False})
    assert not native.plan.portable
    bare = list(native.plan.weights.values())
    assert job.plan.nbytes == sum(parts.layout_nbytes(w.shape, w.specs) for w in bare) + 16 * len(bare)
    assert native.plan.nbytes == job.plan.nbytes - 16 * len(bare)


@pytest.mark.parametrize(("settings", "why"), NATIVE_BECAUSE, ids=[f"{s}" for s, _ in NATIVE_BECAUSE])
def test_what_has_none_is_native_and_says_why(settings: dict, why: str) -> None:
    job, recipe = planned(settings)
    assert not job.plan.portable
    told = why_native(recipe, job.skeleton, job.plan.weights)
    assert told is not None
    assert why in told
    with pytest.raises(RecipeError, match=f"portable contradicts .*{re.escape(why)}"):
        planned({**settings, "portable": True})


def test_a_budget_alone_buys_rows_natively() -> None:
    """Portable, the same budget goes by groups."""
    for settings, why in (({"bits": 2.5, "widths": "2,3"}, "per row: "), ({"size": "450kB"}, "method coded: ")):
        job, recipe = planned(settings)
        assert not job.plan.portable
        assert str(why_native(recipe, job.skeleton, job.plan.weights)).startswith(why)
        assert planned({**settings, "portable": True})[0].plan.portable


def test_transposed_weights_are_native(random_model) -> None:
    job, recipe = planned({"method": "rtn", "bits": 4, "group_size": 16}, str(random_model("gpt2")))
    assert not job.plan.portable
    assert "c_attn: a weight that is stored transposed" in str(why_native(recipe, job.skeleton, job.plan.weights))


def test_the_command_says_the_format_and_why(tmp_path: Path) -> None:
    def made(name: str, *options: object) -> dict:
        out = ["--out", str(tmp_path / name), "--json", "-q", "--method", "rtn", "--bits", "4"]
        result = CliRunner().invoke(app, ["quantize", "demo", *out, *map(str, options)])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    portable, native, uneven = made("a"), made("b", "--native"), made("c", "--group-size", 100)
    assert [one["format"] for one in (portable, native, uneven)] == ["compressed-tensors", "llmsqueeze", "llmsqueeze"]
    assert portable["why_native"] is None
    assert native["why_native"] == "--native"
    assert uneven["why_native"].startswith("group size 100: it does not divide the 128 columns")
    assert all(one["predicted_portable"] is None for one in (portable, native, uneven))
    assert portable["nbytes"] == native["nbytes"] + 16 * 28
    assert portable["opens"] == {"native": "", "transformers": "", "vllm": ""}
    assert native["opens"]["native"] == ""
    assert native["opens"]["transformers"]
    told = [json.loads((tmp_path / name / "llmsqueeze.json").read_text())["format"] for name in "abc"]
    assert told == [one["format"] for one in (portable, native, uneven)]


def test_a_budget_has_room_for_the_shapes() -> None:
    """Two bits everywhere and not a byte more is native; portable it needs 16 bytes for each of the 28."""
    settings = {**AUTO, "bits": None, "widths": [2, 3]}
    native, _ = planned({**settings, "size": "1MB", "portable": False})
    grid = Grid(2, 128, symmetric=True)
    narrow = native.plan.on({name: (Rows(grid, w.shape[0]),) for name, w in native.plan.weights.items()})
    least = native.kept_nbytes + narrow.nbytes

    def target(size: int, portable: bool) -> int | None:
        job, recipe = planned({**settings, "size": size, "portable": portable})
        return target_nbytes(recipe, job.plan, job.kept_nbytes, job.checkpoint.nbytes)

    assert target(least, False) == narrow.nbytes
    assert target(least + 16 * 28, True) == narrow.nbytes + 16 * 28
    with pytest.raises(RecipeError, match=f"size {least + 16 * 28 - 1} bytes is too small"):
        target(least + 16 * 28 - 1, True)
    with pytest.raises(RecipeError, match=f"size {least - 1} bytes is too small"):
        target(least - 1, False)


def test_what_a_portable_result_would_cost_is_what_it_costs() -> None:
    """With the same bytes and fewer choices the loss increase is no smaller; one profile serves both."""
    settings = {"method": "budget", "bits": 2.6, "quantizer": "rtn", "samples": 2, "seq_len": 48}
    free, recipe = planned(settings)
    free = replace(free, calibration=prepare(Source("demo"), recipe, Progress()).calibration)
    assert free.calibration is not None
    with Spill() as spill:
        walk = Walk(free.skeleton, free.calibration.rows, spill, torch.float32, torch.device("cpu"))
        profile = measure(walk, walk.embed(), free.plan.dtypes, request_of(recipe), Progress())

    def decided(settings: dict) -> Decision:
        job, recipe = planned(settings)
        target = target_nbytes(recipe, job.plan, job.kept_nbytes, job.checkpoint.nbytes)
        made = decide(job.plan, profile, recipe, job.skeleton.linears, target)
        assert target is not None
        assert 0.9 * target < made.plan.nbytes <= target
        return made

    native, portable = decided(settings), decided({**settings, "portable": True})
    assert not native.plan.portable
    assert portable.plan.portable
    assert portable.predicted_portable is None
    assert native.predicted is not None
    assert native.predicted_portable is not None
    assert native.predicted_portable >= native.predicted > 0
    assert native.predicted_portable == pytest.approx(portable.predicted, rel=1e-9)
    assert decided({**settings, "importance": "uniform"}).predicted_portable is None, "nothing was measured for it"


@pytest.mark.parametrize("portable", [None, True])
def test_a_uniform_budget_by_groups_is_written_or_refused(portable: bool | None, tmp_path: Path) -> None:
    """Its rows are on two widths, which compressed-tensors has no place for."""
    settings = {**AUTO, "importance": "uniform", "quantizer": "rtn", "portable": portable, "samples": 2, "seq_len": 32}
    with contextlib.suppress(RecipeError):
        assert quantize("demo", make_recipe(settings), tmp_path / "out").format == "llmsqueeze"
