"""HTML pages: their facts are right, nothing in them runs or leaves the machine, and a browser shows and sorts them."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import save_file
from support import command, refused, thorough

from llmsqueeze import parts
from llmsqueeze.cli.app import app
from llmsqueeze.distillation.settings import make_distillation
from llmsqueeze.errors import CheckpointError
from llmsqueeze.files import COMPARISON, EVALUATION, SIDECAR
from llmsqueeze.formats.export import export
from llmsqueeze.parts import Grid
from llmsqueeze.publish import numbers
from llmsqueeze.publish.folder import read_folder
from llmsqueeze.publish.page.comparison import comparison_page
from llmsqueeze.publish.page.pictures import MOST_BLOCKS, blocks_of
from llmsqueeze.publish.provenance import distill_command, recipe_yaml
from llmsqueeze.publish.report import SHOWN, write_report
from llmsqueeze.recipe.methods import METHODS
from llmsqueeze.recipe.resolve import make_recipe

KINDS = [f"self_attn.{k}_proj" for k in "qkvo"] + [f"mlp.{k}_proj" for k in ("gate", "up", "down")]
ROWS, COLS = 16, 64
# what loads something that is not in the page
LOADING = re.compile(r"""\bsrc="(?!data:)|\b(?:srcset|action)=|@import|url\(|https?:""")
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
TOKEN = "hf_" + "a1B2" * 9
SCORES = {
    "perplexity": 3.2,
    "perplexity_stderr": 0.05,
    "tokens": 28649,
    "kl_mean": 0.0123,
    "kl_p99": 0.2,
    "top1_changed": 0.034,
    "tasks": {"demo_stories": {"acc": 0.85, "acc_stderr": 0.02}},
    "text": "stories",
    "window": 256,
    "nll_difference": 0.0645,
    "nll_difference_stderr": 0.001,
}
BASELINE = {"perplexity": 3.0, "perplexity_stderr": 0.04, "tasks": {"demo_stories": {"acc": 0.86, "acc_stderr": 0.02}}}


def make_folder(path: Path, blocks: int = 3, **changes: Any) -> Path:
    """A folder in our format with tiny weights: as many blocks as a large model, errors that tell linears apart.

    The first blocks have more 4-bit rows, the others are on 2 bits.
    """
    path.mkdir(parents=True)
    tensors = {"model.embed_tokens.weight": torch.zeros(100, COLS, dtype=torch.bfloat16)}
    weights, errors = {}, {}
    for block in range(blocks):
        for at, kind in enumerate(KINDS):
            name = f"model.layers.{block}.{kind}"
            high = max(0, ROWS - 4 * block - at)
            shares = [(bits, rows) for bits, rows in ((4, high), (2, ROWS - high)) if rows]
            specs = [
                parts.grid_spec(Grid(bits, 32, True), torch.bfloat16, rows if rows < ROWS else None)
                for bits, rows in shares
            ]
            weights[name] = {"shape": [ROWS, COLS], "parts": specs}
            for i, spec in enumerate(specs):
                for tensor, (shape, dtype) in parts.layout((ROWS, COLS), spec).items():
                    tensors[f"{name}.parts.{i}.{tensor}"] = torch.zeros(shape, dtype=dtype)
            errors[name] = float(f"{0.3 * math.exp(-((block * 37 + at * 11) % (7 * blocks)) / 4):.6g}")
    save_file(tensors, path / "model.safetensors")
    quantization = {"quant_method": "llmsqueeze", "format_version": 2, "weights": weights}
    config = {"model_type": "llama", "num_hidden_layers": blocks, "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    record = {
        "model": "owner/llama",
        "revision": "abc123",
        "recipe": {"method": "budget", "bits": 3.0, "symmetric": False, "widths": [2, 4], "size": None, "skip": []},
        "calibration": {"source": "wikitext", "samples": 128, "seq_len": 2048, "tokens": 262144},
        "versions": {"torch": "2.13.0"},
        "llmsqueeze_version": "0.1.0",
        "format": "llmsqueeze",
        "code_bits": 2.5,
        "bits_per_weight": 3.0,
        "predicted_loss_increase": 0.05,
        "quantized_weights": ROWS * COLS * 7 * blocks,
        "nbytes": sum(tensor.nbytes for tensor in tensors.values()),
        "nbytes_original": 2 * ROWS * COLS * 7 * blocks + 2 * 100 * COLS,
        "errors": errors,
    }
    (path / SIDECAR).write_text(json.dumps(record | changes))
    return path


def make_comparison(this: str = "small") -> dict[str, Any]:
    rows = [
        ("owner/llama", "original", 1_735_424, 0.0, 0.0, True),
        (this, "llmsqueeze", 428_000, 0.0047, 0.0009, True),
        ("worse", "llmsqueeze", 430_000, 0.155, 0.003, False),
        ("portable", "compressed-tensors", 571_000, -0.0002, 0.0004, True),
        ("llama in nf4", "bitsandbytes nf4", 584_000, 0.0093, 0.0008, False),
    ]
    models = [
        {
            "model": name,
            "kind": kind,
            "this": name == this,
            "nbytes": nbytes,
            "bits_per_weight": 4.5,
            "perplexity": 3 * math.exp(loss),
            "perplexity_stderr": 0.045,
            "on_frontier": best,
            "nll_difference": loss,
            "nll_difference_stderr": spread,
            "kl_mean": loss,
            "kl_p99": 9 * loss,
            "top1_changed": 4 * abs(loss),
            "tasks": {
                "piqa": {"acc": 0.8 - loss, "acc_stderr": 0.02, "acc_difference": -loss, "acc_difference_stderr": 0.01}
            },
        }
        for name, kind, nbytes, loss, spread, best in rows
    ]
    return {"text": "stories", "window": 256, "tokens": 28649, "models": models}


def page_of(folder: Path) -> str:
    return Path(write_report(folder)["out"]).read_text(encoding="utf-8")


def rows_of(html: str, table: str = 'id="weights"') -> list[list[str]]:
    """The texts in a table's body, cell by cell."""
    body = re.search(rf"<table[^>]*{table}.*?<tbody>(.*?)</tbody>", html, re.DOTALL)
    assert body
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in body[1].split("<tr")[1:]]
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in row] for row in cells]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "small")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Most tests are about the text, and plots take time; those that ask for `pictures` get them."""
    if "pictures" not in request.fixturenames:
        find = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))


@pytest.fixture
def pictures() -> None:
    pytest.importorskip("matplotlib")


def images(html: str) -> list[tuple[str, str]]:
    """(source, alternative text) of each picture."""
    return re.findall(r'<img src="([^"]*)" alt="([^"]*)">', html)


@pytest.fixture(scope="module")
def demo_folder(compressed: Callable[[str], Path]) -> Path:
    return compressed("native")


# the facts of a report


def test_the_report_says_what_the_folder_is(folder: Path) -> None:
    (folder / EVALUATION).write_text(json.dumps(SCORES | {"baseline": BASELINE}))
    html = page_of(folder)
    bits = read_folder(folder).bits_per_weight
    assert f"owner/llama at {bits:.2f} bits per weight: 2.5× smaller, perplexity +6.67 %." in html
    assert f"Method</dt><dd>budget: {METHODS['budget'].report}" in html
    assert "Calibration</dt><dd>wikitext, 128 samples of 2,048 tokens" in html
    assert "21,504 weights in 21 linear layers" in html
    assert ["Perplexity lower is better", "3.000 ± 0.040", "3.200 ± 0.050", "+6.67 % ± 0.10"] in rows_of(html, "scores")
    assert ["demo_stories acc", "0.8600 ± 0.0200", "0.8500 ± 0.0200", "−0.0100 ± 0.0283"] in rows_of(html, "scores")
    assert "28,649 tokens in windows of 256" in html
    assert "llmsqueeze quantize owner/llama --recipe recipe.yaml --revision abc123" in html
    assert "llmsqueeze compare owner/llama small" in html


def test_the_weights_stand_worst_first(folder: Path) -> None:
    read, rows = read_folder(folder), rows_of(page_of(folder))
    assert len(rows) == 21
    ordered = sorted(read.linears, key=lambda linear: -(linear.error or 0))
    assert [row[0] for row in rows] == [linear.name for linear in ordered]
    assert rows[0] == ["model.layers.0.self_attn.q_proj", "30 %", "4.50", "576 B", "4 bit g32"]
    mixed = next(row for row in rows if row[0] == "model.layers.0.self_attn.k_proj")
    assert mixed[4] == "94 % 4 bit, 6.2 % 2 bit, g32"


def test_bytes_and_bits_are_the_files(folder: Path) -> None:
    from llmsqueeze.publish.show import contents

    read, shown = read_folder(folder), contents(str(folder))
    assert read.linear_nbytes == sum(row.nbytes for row in shown.rows)
    assert read.bits_per_weight == shown.bits_per_weight
    assert read.nbytes - read.linear_nbytes == shown.kept_nbytes == 2 * 100 * COLS


def test_a_linear_without_an_error_comes_last(folder: Path) -> None:
    record = json.loads((folder / SIDECAR).read_text())
    del record["errors"]["model.layers.0.self_attn.q_proj"]
    record["errors"]["model.layers.0.self_attn.k_proj"] = math.nan
    (folder / SIDECAR).write_text(json.dumps(record))
    assert {tuple(row[:2]) for row in rows_of(page_of(folder))[-2:]} == {
        ("model.layers.0.self_attn.q_proj", "–"),
        ("model.layers.0.self_attn.k_proj", "–"),
    }


def test_a_missing_score_is_named_with_its_command(folder: Path) -> None:
    html = page_of(folder)
    assert "perplexity not measured yet" in html
    assert "llmsqueeze eval small --baseline owner/llama" in html
    (folder / EVALUATION).write_text(json.dumps({"perplexity": 3.2, "perplexity_stderr": 0.05}))
    html = page_of(folder)
    assert "The original was not measured" in html
    assert "llmsqueeze eval small --baseline owner/llama" in html
    assert ["Perplexity lower is better", "–", "3.200 ± 0.050", "–"] in rows_of(html, "scores")


def test_the_recipe_makes_the_same_again(demo_folder: Path, folder: Path) -> None:
    record = json.loads((demo_folder / SIDECAR).read_text())
    assert make_recipe(yaml.safe_load(recipe_yaml(record["recipe"]))).as_dict() == record["recipe"]
    assert yaml.safe_load(recipe_yaml(json.loads((folder / SIDECAR).read_text())["recipe"]))["symmetric"] is False
    assert "widths: [2, 4]" in page_of(folder)


def test_commands_parse() -> None:
    about = {"teacher": "demo", "settings": make_distillation({"loss": "dad", "train": "scales,codes"}).__dict__}
    command = distill_command(about | {"settings": json.loads(json.dumps(about["settings"]))})
    assert "--train scales,codes" in command
    assert "--moves" in command
    _, verb, *arguments = shlex.split(command)
    group: Any = typer.main.get_command(app)
    with group.commands[verb].make_context(verb, arguments) as context:
        assert context.params["seed"] == 0
    blockwise = make_distillation({"blockwise": True}).__dict__
    assert "--loss" not in distill_command({"teacher": "demo", "settings": blockwise})


def test_a_distillation_of_the_recipe_is_no_second_command(folder: Path) -> None:
    record = json.loads((folder / SIDECAR).read_text())
    about = {"teacher": "owner/llama", "settings": {"steps": 7}, "kl_before": 0.2, "kl_after": 0.1}
    (folder / SIDECAR).write_text(json.dumps(record | {"distillation": [about]}))
    html = page_of(folder)
    assert "llmsqueeze distill FOLDER --teacher owner/llama --steps 7" in html
    assert "0.200 → 0.100 nats" in html
    record["recipe"]["distill_steps"] = 7
    (folder / SIDECAR).write_text(json.dumps(record | {"distillation": [about]}))
    assert "llmsqueeze distill" not in page_of(folder)


def test_the_three_formats(demo_folder: Path, tmp_path: Path) -> None:
    export(str(demo_folder), "compressed-tensors", tmp_path / "portable")
    export(str(demo_folder), "dense", tmp_path / "dense")
    native, portable, dense = map(read_folder, (demo_folder, tmp_path / "portable", tmp_path / "dense"))
    assert (native.dense, portable.dense, dense.dense) == (False, False, True)
    assert [one.name for one in native.linears] == [one.name for one in portable.linears]
    assert [one.error for one in native.linears] == [one.error for one in dense.linears]
    assert native.bits_per_weight < portable.bits_per_weight < dense.bits_per_weight == 16
    html = page_of(tmp_path / "portable")
    assert "Format</dt><dd>compressed-tensors" in html
    assert html.count("14 linears in 2 blocks: from") == 2, "bits and errors"
    html = page_of(tmp_path / "dense")
    assert "exported as ordinary weights: as large as before" in html
    assert "same width everywhere" in html
    assert "14 linears in 2 blocks: from" in html, "the errors"


def test_a_large_model_stays_readable(tmp_path: Path, pictures: None) -> None:
    html = page_of(make_folder(tmp_path / "huge", blocks=126))
    assert len(rows_of(html)) == 882
    assert f'data-shown="{SHOWN}" hidden>Show all 882' in html
    assert len(html) < 1_100_000
    sizes, bits, errors = images(html)
    assert sizes[1].startswith("Sizes of original and result. Original: 1.82 MB, of which ")
    assert bits[0].startswith("data:image/svg+xml;base64,")
    assert bits[1] == (
        "Bits per weight by decoder block and linear. 882 linears in 126 blocks: from 2.50 (block 10, "
        "mlp.down_proj) to 4.50 bits per weight (block 0, self_attn.q_proj)."
    )
    assert errors[1].startswith("Output error in percent by decoder block and linear. 882 linears in 126 blocks")


def test_without_matplotlib_a_page_says_what_pictures_need(folder: Path) -> None:
    (folder / COMPARISON).write_text(json.dumps(make_comparison()))
    html = page_of(folder)
    assert html.count("Pictures need <code>pip install 'llmsqueeze[plots]'</code>.") == 1
    assert images(html) == []
    assert "21 linears in 3 blocks: from" in html
    assert "llmsqueeze[plots]" in comparison_page(make_comparison())


def test_linears_are_drawn_by_their_block() -> None:
    assert blocks_of(["model.layers.1.up", "lm_head", "model.layers.0.up"], 3) == [
        ["model.layers.0.up"],
        ["model.layers.1.up"],
        [],
    ]
    assert blocks_of(["lm_head"], 3) == []
    assert blocks_of([f"model.layers.{10**9}.up"], 3) == blocks_of(["h.0.up"], MOST_BLOCKS + 1) == []


# comparisons


def test_a_comparison_is_drawn_and_tabled(folder: Path, pictures: None) -> None:
    (folder / COMPARISON).write_text(json.dumps(make_comparison()))
    html = page_of(folder)
    rows = rows_of(html, 'class="models"')
    assert rows[1][1:5] == ["428 kB", "+0.0047 ± 0.0009", "4.50", "3.014 ± 0.045"]
    assert "llmsqueeze, this folder" in rows[1][0]
    assert [row[-1] for row in rows] == ["yes", "yes", "", "yes", ""]
    ((_, text),) = [one for one in images(html) if one[1].startswith("Loss increase against size. small: 428 kB")]
    assert "small: 428 kB, loss +0.00470 ± 0.00090 nats per token, on the frontier; worse: 430 kB" in text
    assert "Pictures need" not in html
    assert "llmsqueeze compare owner/llama" not in html


def equal_sizes(comparison: dict[str, Any]) -> dict[str, Any]:
    """The same with methods, and the bytes of all folders about equal."""
    original, *others = comparison["models"]
    methods = ("gptq", "layerwise", "mixllm", "bitsandbytes nf4")
    made = [{"nbytes": 428_000 + 10 * i, "method": method, "bits": 2.6} for i, method in enumerate(methods)]
    return comparison | {"models": [original, *(one | new for one, new in zip(others, made, strict=True))]}


def verdict_of(html: str) -> list[str]:
    """Without the spaces that do not break."""
    return [text.replace("\xa0", " ") for text in re.findall(r'<p class="verdict">(.*?)</p>', html)]


def test_a_winner_is_named_in_words(pictures: None) -> None:
    """At one size the model that loses least, and over several sizes the frontier."""
    html = comparison_page(equal_sizes(make_comparison("6")))
    assert "−0.0002\xa0±\xa00.0004; next" in html
    assert verdict_of(html) == [
        "Least loss of 4 models at 428 kB: mixllm, 2.6 bits: portable, −0.0002 ± 0.0004; next gptq, 2.6 bits: 6, "
        "+0.0047 ± 0.0009.",
        "On the frontier, the smallest first: gptq, 2.6 bits: 6 (428 kB, loss +0.0047 ± 0.0009); mixllm, 2.6 bits: "
        "portable (428 kB, loss −0.0002 ± 0.0004).",
    ]
    assert "they stand in the order of their loss" in html
    assert [row[0] for row in rows_of(html, 'class="models"')][1] == "2gptq, 2.6 bits: 6 llmsqueeze, this folder"
    comparison = make_comparison()
    comparison["models"][2] |= {"nll_difference": 0.0051}
    assert verdict_of(comparison_page(comparison)) == [
        "Least loss of 2 models at 428 kB to 430 kB: small, +0.0047 ± 0.0009; next worse, +0.0051 ± 0.0030, which may "
        "be chance.",
        "Least loss of all: portable (571 kB, loss −0.0002 ± 0.0004).",
        "On the frontier, the smallest first: small (428 kB, loss +0.0047 ± 0.0009); portable (571 kB, loss "
        "−0.0002 ± 0.0004).",
    ]


@pytest.mark.parametrize("models", [1, 2])
def test_nothing_is_won_by_one_model_alone(models: int) -> None:
    html = comparison_page(make_comparison() | {"models": make_comparison()["models"][:models]})
    assert not any(sentence.startswith("Least loss") for sentence in verdict_of(html))


def test_only_clear_differences_of_tasks_are_bold() -> None:
    html = comparison_page(make_comparison())
    assert re.findall(r'class="sub beyond">(.*?)<', html) == ["−0.1550 ± 0.0100"]
    assert '<span class="sub">−0.0047 ± 0.0100</span>' in html


def test_the_same_comparison_gives_the_same_page(pictures: None) -> None:
    assert comparison_page(make_comparison()) == comparison_page(make_comparison())


def test_a_comparison_without_text_has_no_plot(pictures: None) -> None:
    comparison = make_comparison()
    for model in comparison["models"]:
        model |= {"perplexity": None, "nll_difference": None, "nll_difference_stderr": None}
    html = comparison_page(comparison | {"text": None, "window": None, "tokens": 0})
    assert "No text was scored" in html
    assert images(html) == []
    assert "piqa acc" in html


@pytest.mark.parametrize("models", [None, [], "x", [1]])
def test_a_comparison_of_nothing_is_refused(models: Any) -> None:
    with pytest.raises(CheckpointError, match="has no models"):
        comparison_page({"models": models})


# text that must not be in a page


def test_text_from_files_is_only_text(folder: Path, pictures: None) -> None:
    record = json.loads((folder / SIDECAR).read_text()) | {"model": EVIL, "license": EVIL, "revision": EVIL}
    record["recipe"]["calibration"] = EVIL
    record["calibration"]["source"] = EVIL
    record["distillation"] = [{"teacher": EVIL, "settings": {"steps": EVIL}}]
    (folder / SIDECAR).write_text(json.dumps(record))
    (folder / EVALUATION).write_text(json.dumps(SCORES | {"text": EVIL, "tasks": {EVIL: {EVIL: 1.0}}}))
    comparison = make_comparison(EVIL)
    comparison["models"][0] |= {"kind": EVIL, "tasks": {EVIL: {"acc": 1.0}}}
    (folder / COMPARISON).write_text(json.dumps(comparison | {"text": EVIL}))
    html = page_of(folder)
    assert html.count("<script") == 1
    assert html.count("<img") == len(images(html)) == 4
    assert not LOADING.search(html)
    assert "&lt;script&gt;" in html


def test_no_local_path_and_no_token_is_shown(folder: Path) -> None:
    record = json.loads((folder / SIDECAR).read_text())
    record |= {"model": "/home/alice/models/llama", "revision": TOKEN}
    record["recipe"]["calibration"] = "/home/alice/notes.txt"
    record["calibration"]["source"] = "/home/alice/notes.txt"
    record["distillation"] = [{"teacher": "/home/alice/models/llama", "settings": {"steps": 1}}]
    (folder / SIDECAR).write_text(json.dumps(record))
    scores = SCORES | {"text": "/home/alice/test.txt", "model": "/home/alice/small"}
    (folder / EVALUATION).write_text(json.dumps(scores | {"tasks": {"/home/alice/task.yaml": {"acc": 1.0}}}))
    comparison = make_comparison("/home/alice/runs/small")
    (folder / COMPARISON).write_text(json.dumps(comparison))
    html = page_of(folder)
    assert "alice" not in html
    assert str(folder.parent) not in html
    assert TOKEN not in html
    assert "notes.txt" in html
    assert "alice" not in comparison_page(comparison)


def test_the_policy_allows_our_script_and_data_and_nothing_else(folder: Path) -> None:
    html = page_of(folder)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert script
    assert policy
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in policy[1]
    assert "default-src &#39;none&#39;" in policy[1]
    assert "img-src data:;" in policy[1]
    assert not LOADING.search(html)


# bad input


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("smal", "there is no folder"),
        ("", "did you mean '"),
        ("empty", "empty has no llmsqueeze.json; name a folder that llmsqueeze wrote"),
    ],
)
def test_a_folder_that_is_not_ours_is_one_line(folder: Path, argument: str, message: str) -> None:
    (folder.parent / "empty").mkdir()
    code, _, stderr = command("report", folder.parent / argument)
    assert code == 2
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
    if argument != "empty":
        assert "small'?" in stderr


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    def is_refused(message: str) -> None:
        code, _, stderr = command("report", folder)
        assert (code, message in stderr) == (2, True), stderr
        assert not (folder / "report.html").exists()

    (folder / COMPARISON).write_text("{")
    is_refused("is not readable JSON")
    (folder / COMPARISON).unlink()
    config = json.loads((folder / "config.json").read_text())
    weights = config["quantization_config"]["weights"]
    weights["model.layers.9.mlp.up_proj"] = weights["model.layers.0.mlp.up_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    is_refused("lacks model.layers.9.mlp.up_proj.parts.0")
    (folder / "model.safetensors").unlink()
    is_refused("safetensors")


def test_the_page_is_written_to_out(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    code, stdout, _ = command("report", folder, "--out", out, "--json")
    assert code == 0
    assert json.loads(stdout)["nbytes"] == out.stat().st_size
    assert not (folder / "report.html").exists()
    for bad in (tmp_path, tmp_path / "none" / "page.html"):
        assert "folder" in refused("report", folder, "--out", bad)


# pieces


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (None, "–"),
        (0.0999, "0.0999"),
        (0.09999, "0.100"),
        (1234.5, "1,234"),
        (-0.5, "−0.500"),
        (1e-12, "0.000000000"),
    ],
)
def test_significant_digits(value: float | None, text: str) -> None:
    assert numbers.significant(value) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (999.9, "1.00 kB"), (427_968, "428 kB"), (1.4e11, "140 GB"), (2e12, "2.00 TB")],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert numbers.size(nbytes) == text


def test_changes_of_the_perplexity() -> None:
    assert numbers.change(3.0, 2.9999999) == "0.00 %"
    assert numbers.change(3.0, 3.03) == "+1.00 %"
    assert numbers.change(3.0, 2.97) == "−1.00 %"
    assert numbers.change(3.0, 600.0) == "200× as high"


# in a browser

ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((file for name in names if (file := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(names)} is installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """(file, width, scheme) -> the opened page; at the end the console is empty and nothing else was loaded."""
    complaints: list[str] = []
    opened = []

    def make(file: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("request", lambda request: request.url == file.as_uri() or complaints.append(request.url))
        page.goto(file.as_uri())
        opened.append(context)
        return page

    yield make
    for context in opened:
        context.close()
    assert [complaint for complaint in complaints if complaint != "data:,"] == []


@pytest.fixture(scope="module")
def large(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of 80 blocks with everything in it."""
    pytest.importorskip("matplotlib")
    folder = make_folder(tmp_path_factory.mktemp("large") / "large", blocks=80)
    (folder / EVALUATION).write_text(json.dumps(SCORES | {"baseline": BASELINE}))
    (folder / COMPARISON).write_text(json.dumps(make_comparison("large")))
    write_report(folder)
    return folder / "report.html"


def column(page: Any, index: int, table: str = "#weights") -> list[str]:
    """The visible cells of a column."""
    script = f"""Array.from(document.querySelector('{table}').tBodies[0].rows).filter(row => !row.hidden)
        .map(row => row.cells[{index}].dataset.value ?? row.cells[{index}].textContent)"""
    texts: list[str] = page.evaluate(script)
    return texts


def test_a_click_sorts(large: Path, open_page: Open) -> None:
    page = open_page(large)
    errors = [float(value) for value in column(page, 1)]
    assert errors == sorted(errors, reverse=True)
    head = page.locator("#weights th", has_text="Bits/weight")
    head.get_by_role("button").click()
    bits = [float(value) for value in column(page, 2)]
    assert bits == sorted(bits, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    assert page.locator("#weights th[aria-sort]").count() == 1
    head.get_by_role("button").click()
    bits = [float(value) for value in column(page, 2)]
    assert bits == sorted(bits)
    assert bits[0] < 3


def test_the_keyboard_sorts(large: Path, open_page: Open) -> None:
    page = open_page(large)
    button = page.locator("#weights th", has_text="Linear").get_by_role("button")
    button.focus()
    page.keyboard.press("Enter")
    names = page.locator("#weights tbody th").all_inner_texts()
    assert names[:8] == [f"model.layers.{i // 7}.{kind}" for i, kind in enumerate([*sorted(KINDS), sorted(KINDS)[0]])]
    page.keyboard.press("Space")
    assert column(page, 0)[0].startswith("model.layers.000079.")


def test_unknown_values_stay_last(tmp_path: Path, open_page: Open) -> None:
    folder = make_folder(tmp_path / "small")
    record = json.loads((folder / SIDECAR).read_text())
    del record["errors"]["model.layers.1.mlp.up_proj"]
    (folder / SIDECAR).write_text(json.dumps(record))
    write_report(folder)
    page = open_page(folder / "report.html")
    assert column(page, 1)[-1] == ""
    page.locator("#weights th", has_text="Output error").get_by_role("button").click()
    errors = column(page, 1)
    assert errors[-1] == ""
    assert [float(value) for value in errors[:-1]] == sorted(float(value) for value in errors[:-1])


def test_the_models_sort_too(large: Path, open_page: Open) -> None:
    page = open_page(large)
    page.locator(".models th", has_text="Loss increase").get_by_role("button").click()
    assert column(page, 2, ".models") == ["0.155", "0.0093", "0.0047", "0.0", "-0.0002"]
    page.locator(".models th", has_text="Size").get_by_role("button").click()
    assert column(page, 1, ".models")[:2] == ["1735424.0", "584000.0"], "as numbers, not as texts"


def test_all_weights_can_be_shown(large: Path, open_page: Open) -> None:
    page = open_page(large)
    more = page.get_by_role("button", name="Show all 560")
    assert len(column(page, 0)) == SHOWN
    more.click()
    assert len(column(page, 0)) == 560
    page.get_by_role("button", name=f"Show {SHOWN} of 560").click()
    page.locator("#weights th", has_text="Size").get_by_role("button").click()
    assert len(column(page, 0)) == SHOWN


@pytest.mark.parametrize(
    ("width", "scheme"),
    [(390, "dark"), (500, "light"), (1280, "light"), (1920, "light"), thorough(1280, "dark"), thorough(390, "light")],
)
def test_it_fits_every_screen(large: Path, open_page: Open, tmp_path: Path, width: int, scheme: str) -> None:
    compared = tmp_path / "comparison.html"
    long = equal_sizes(make_comparison("models/a-model-with-a-name-as-long-as-they-are-8B-Instruct-2.6bit-out"))
    compared.write_text(comparison_page(long), encoding="utf-8")
    for file in (large, compared):
        page = open_page(file, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.evaluate("getComputedStyle(document.body).color")
        assert (brightness(paper) > brightness(ink)) == (scheme == "light")
        assert all(page.locator("figure.plot img").evaluate_all("all => all.map(i => i.naturalWidth > 300)"))
        outside = page.evaluate(
            """Array.from(document.querySelectorAll('main *')).filter(e => !e.closest('.scroll, pre, svg'))
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
        )
        assert outside == []
        cropped = page.locator(".scroll").evaluate_all(
            "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.getAttribute('aria-label'))"
        )
        assert width < 1280 or cropped == [], "on a wide screen nothing has to be scrolled"
        texts_can_be_read(page)


def brightness(colour: str) -> float:
    return sum(float(channel) for channel in re.findall(r"[\d.]+", colour)[:3])


def texts_can_be_read(page: Any) -> None:
    """Contrast of at least 4.5 (WCAG AA) for the text on the page."""
    pairs = page.evaluate(
        """Array.from(document.querySelectorAll('.note, .lead, dt, th button'))
            .map(e => [getComputedStyle(document.body).backgroundColor, getComputedStyle(e).color])"""
    )
    assert len(pairs) > 15
    assert min(contrast(*pair) for pair in pairs) >= 4.5


def contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        channels = [float(channel) / 255 for channel in re.findall(r"[\d.]+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_hostile_name_runs_nothing(tmp_path: Path, open_page: Open) -> None:
    folder = make_folder(tmp_path / "small", model=EVIL)
    write_report(folder)
    page = open_page(folder / "report.html")
    assert page.title().startswith("small: <script>")
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0


def test_the_policy_stops_an_injected_script(folder: Path, browser: Any) -> None:
    """If an escape were missing."""
    html = page_of(folder).replace("<main>", f"<main>{EVIL}<script src='https://example.com/x.js'></script>")
    (folder / "report.html").write_text(html)
    page = browser.new_page()
    page.goto((folder / "report.html").as_uri())
    assert page.title() != "owned"
    page.close()
