"""The card: its facts, its metadata as the Hub reads them, and nothing of the maker's disk."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_folder import COMPARISON, EVALUATION, SIDECAR, front_matter, write_json
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from llmsqueeze.formats.check import check
from llmsqueeze.formats.export import export
from llmsqueeze.formats.public import shown
from llmsqueeze.formats.record import provenance
from llmsqueeze.model.original import Source
from llmsqueeze.publish.card import model_card
from llmsqueeze.publish.folder import read_folder
from llmsqueeze.publish.numbers import exact_size
from llmsqueeze.publish.provenance import chosen
from llmsqueeze.recipe.resolve import make_recipe


def code_blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


@pytest.fixture(scope="module")
def portable(compressed: Callable[[str], Path]) -> Path:
    return compressed("portable")


def test_card_front_matter_names_the_original_and_invents_no_license(folder: Path) -> None:
    assert front_matter(model_card(folder)) == {
        "base_model": "meta-llama/Llama-3.1-8B",
        "base_model_relation": "quantized",
        "library_name": "llmsqueeze",
        "pipeline_tag": "text-generation",
        "tags": ["llmsqueeze", "quantized", "3-bit"],
    }


@pytest.mark.parametrize("model", ["demo", "Llama-3.1-8B"])
def test_card_of_a_local_model_has_no_base_model(tmp_path: Path, model: str, make_folder: Callable[..., Path]) -> None:
    front = front_matter(model_card(make_folder(tmp_path / "out", model=model)))
    assert "base_model" not in front
    assert "base_model_relation" not in front


def test_card_takes_the_license_from_the_sidecar(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    folder = make_folder(tmp_path / "out", license="llama3.1")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert front_matter(model_card(folder))["license"] == "llama3.1"


def test_card_carries_what_the_originals_card_says(
    tmp_path: Path, make_folder: Callable[..., Path], demo_of: Callable[[int], Path]
) -> None:
    """Read when the model was compressed; a local model keeps the base that its own card names."""
    original = Path(shutil.copytree(demo_of(1), tmp_path / "original"))
    said = {
        "language": ["en", "de"],
        "datasets": ["owner/set"],
        "tags": ["chat", "safetensors"],
        "base_model": "o/base",
    }
    (original / "README.md").write_text(f"---\n{yaml.safe_dump(said | {'widget': 1})}---\n# Original\n")
    assert provenance(Source(str(original)), original)["card"] == said
    front = front_matter(model_card(make_folder(tmp_path / "out", model="original", card=said)))
    assert {key: front[key] for key in ("language", "datasets", "base_model")} == {
        key: said[key] for key in ("language", "datasets", "base_model")
    }
    assert front["tags"] == ["llmsqueeze", "quantized", "3-bit", "chat"]
    assert "base_model_relation" not in front
    of_hub = front_matter(model_card(make_folder(tmp_path / "out2", model="owner/model", card=said)))
    assert (of_hub["base_model"], of_hub["base_model_relation"]) == ("owner/model", "quantized")


def test_card_carries_the_license_of_the_readme_that_is_there(folder: Path) -> None:
    license_lines = "license: other\nlicense_name: my-terms\nlicense_link: https://example.com/LICENSE.md\n"
    (folder / "README.md").write_text(f"---\nlanguage: en\n{license_lines}---\n# Hello\n", encoding="utf-8")
    front = front_matter(model_card(folder))
    assert {key: front.get(key) for key in yaml.safe_load(license_lines)} == yaml.safe_load(license_lines)
    assert "language" not in front


@pytest.mark.parametrize("readme", ["# no front matter", "---\n: [\n---\n", "---\n- a list\n---\n", "---\n"])
def test_card_survives_a_readme_without_usable_metadata(folder: Path, readme: str) -> None:
    (folder / "README.md").write_text(readme, encoding="utf-8")
    assert "license" not in front_matter(model_card(folder))


def test_card_states_the_sizes_of_the_files(folder: Path) -> None:
    card, read = model_card(folder), read_folder(folder)
    original, share = "16.1 GB (16,060,522,496 bytes)", 100 * read.nbytes / 16060522496
    assert f"| All weights | {original} | {exact_size(read.nbytes)} ({share:.1f} % of the original) |" in card
    assert f"| Bits per weight, everything counted |  | {read.bits_per_weight:.2f} |" in card
    assert "| Quantized linear layers |  | 14 |" in card
    assert f"all data of the {read.weights:,} weights" in card
    assert f"to {read.bits_per_weight:.2f} bits per weight." in card


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB (1,000 bytes)"),
        (2**30, "1.07 GB (1,073,741,824 bytes)"),
    ],
)
def test_exact_size(count: int, text: str) -> None:
    assert exact_size(count) == text


def test_card_states_the_scores_before_and_after(folder: Path) -> None:
    write_json(folder / "evaluation.json", EVALUATION)
    card = model_card(folder)
    assert "| Perplexity | 6.244 | 7.126 | +14.13 % |" in card
    assert "| KL divergence, mean | 0 | 0.0312 |  |" in card
    assert "| KL divergence, 99th percentile | 0 | 0.200 |  |" in card
    assert "| piqa acc | 0.8003 ± 0.0100 | 0.7812 ± 0.0101 | −0.0191 ± 0.0142 |" in card
    assert "Text: Salesforce/wikitext wikitext-2-raw-v1 test, 12,345 tokens." in card
    assert "llmsqueeze eval" not in card
    assert "alias" not in card


def test_card_without_a_baseline_gives_the_command_that_measures_it(folder: Path) -> None:
    write_json(folder / "evaluation.json", EVALUATION | {"baseline": None, "kl_mean": None, "tasks": {}})
    card = model_card(folder)
    assert "| Perplexity | – | 7.126 | – |" in card
    assert "KL divergence, mean" not in card
    assert "llmsqueeze eval Llama-3.1-8B-3bit --baseline meta-llama/Llama-3.1-8B" in card


@pytest.mark.parametrize("scores", [None, {"perplexity": None, "tasks": {}, "baseline": None}])
def test_card_without_scores_gives_the_command_that_makes_them(folder: Path, scores: dict[str, Any] | None) -> None:
    if scores is not None:
        write_json(folder / "evaluation.json", scores)
    card = model_card(folder, "me/small")
    assert "Not measured yet." in card
    assert "llmsqueeze eval me/small --baseline meta-llama/Llama-3.1-8B" in card
    assert "| Perplexity" not in card
    assert "model-index" not in card
    assert "Its quality was not measured." in card


def test_card_warns_loudly_and_its_snippets_are_python(folder: Path) -> None:
    card = model_card(folder, "me/small")
    assert "> [!WARNING]\n> **LOAD THIS MODEL WITH `llmsqueeze.load`, OR IMPORT `llmsqueeze.hf` FIRST.**" in card
    assert "**RANDOM VALUES**" in card
    assert "pip install llmsqueeze" in card
    ours, plain = code_blocks(card, "python")
    compile(ours, "ours", "exec")
    compile(plain, "plain", "exec")
    assert "import llmsqueeze\n" in ours
    assert 'llmsqueeze.load("me/small")' in ours
    assert plain.index("import llmsqueeze.hf") < plain.index('AutoModelForCausalLM.from_pretrained("me/small")')


def test_card_recipe_is_the_whole_recipe_and_its_command_names_model_and_revision(folder: Path) -> None:
    card = model_card(folder)
    (recipe,) = code_blocks(card, "yaml")
    assert yaml.safe_load(recipe) == chosen(SIDECAR["recipe"])
    assert make_recipe(yaml.safe_load(recipe)).bits == 3
    assert "It needs the calibration text" not in card
    (command,) = [line for line in card.splitlines() if line.startswith("llmsqueeze quantize")]
    assert shlex.split(command) == [
        *("llmsqueeze", "quantize", "meta-llama/Llama-3.1-8B", "--recipe", "recipe.yaml"),
        *("--revision", SIDECAR["revision"]),
    ]


def test_card_states_calibration_and_versions(folder: Path) -> None:
    card = model_card(folder)
    assert "Salesforce/wikitext wikitext-2-raw-v1 train, 128 samples of 2,048 tokens, 262,144 tokens in all." in card
    assert "5e" * 32 in card
    assert "llmsqueeze 0.1.0, format 1, torch 2.13.0, transformers 5.23.0" in card


def test_card_of_a_method_without_calibration_says_so(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    assert "None: this recipe reads no text." in model_card(make_folder(tmp_path / "out", calibration=None))


def test_card_has_no_absolute_path_user_name_or_token(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    token = "hf_" + "aB3" * 12
    home = "/home/carol/private"
    recipe = SIDECAR["recipe"] | {
        "calibration": f"{home}/notes.txt",
        "note": f"from {home}/a b and {token}",
    }
    calibration = SIDECAR["calibration"] | {"source": f"{home}/notes.txt"}
    folder = make_folder(tmp_path / "out", model=f"{home}/tiny", revision=None, recipe=recipe, calibration=calibration)
    scores = EVALUATION | {"model": f"{home}/out", "text": f"{home}/eval.txt", "baseline": None}
    write_json(folder / "evaluation.json", scores)
    card = model_card(folder)
    for secret in ("carol", "private", "/home", str(tmp_path), token):
        assert secret not in card
    (recipe_text,) = code_blocks(card, "yaml")
    assert yaml.safe_load(recipe_text)["calibration"] == "notes.txt"
    assert "llmsqueeze quantize tiny --recipe recipe.yaml\n" in card
    assert "It needs the calibration text `notes.txt`" in card
    assert "Text: eval.txt," in card
    assert "base_model" not in card


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("/home/carol/calib.jsonl", "calib.jsonl"),
        ("/home/carol/my texts/calib", "calib"),
        ("~/calib.jsonl", "calib.jsonl"),
        ("../calib", "calib"),
        ("texts/calib.jsonl", "calib.jsonl"),
        (r"C:\Users\carol\calib.txt", "calib.txt"),
        ("file:///home/carol/calib.txt", "calib.txt"),
        ("local:/home/carol/calib.txt, 128 samples", "local:calib.txt, 128 samples"),
        ("Salesforce/wikitext wikitext-2-raw-v1 train", "Salesforce/wikitext wikitext-2-raw-v1 train"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("someone/books train.txt", "someone/books train.txt"),
        (r"\\server\carol\calib", "calib"),
        ("https://example.com/terms/LICENSE.md", "https://example.com/terms/LICENSE.md"),
        (r".*\.gate$", r".*\.gate$"),
        (r"\.gate$", r"\.gate$"),
        ("model.layers.*.mlp", "model.layers.*.mlp"),
        (["/tmp/a.txt", 3, None], ["a.txt", 3, None]),
    ],
)
def test_shown_cuts_local_paths_and_nothing_else(value: Any, public: Any) -> None:
    assert shown(value) == public


# Beside other models


def test_card_shows_the_comparison_with_this_model_in_bold(folder: Path) -> None:
    write_json(folder / "comparison.json", COMPARISON)
    card = model_card(folder)
    header = "|  | Bytes | Bits per weight | Perplexity | KL divergence, mean | KL, 99th percentile | Changed top-1 |"
    assert f"{header} arc_easy acc |" in card
    assert "| meta-llama/Llama-3.1-8B (original) | 16,060,522,496 | 16.00 | 6.250 ± 0.050 | – | – | – | – |" in card
    ours = (
        "Llama-3bit (llmsqueeze) *",
        "4,100,000,000",
        "3.41",
        "7.130 ± 0.060",
        "0.0300",
        "0.210",
        "8.5 %",
        "0.6100 ± 0.0200",
    )
    assert "| " + " | ".join(f"**{cell}**" for cell in ours) + " |" in card
    assert "| other (bitsandbytes nf4) | 5,000,000,000 | 4.50 | 7.500 | – | – | – | – |" in card
    assert "Text: Salesforce/wikitext wikitext-2-raw-v1 test, 67,890 tokens." in card
    assert "* marks the frontier" in card
    assert "carol" not in card


def test_card_leaves_out_columns_that_nobody_has_a_number_in(folder: Path) -> None:
    models = [{**row, "kl_mean": None, "top1_changed": None, "tasks": {}} for row in COMPARISON["models"]]
    write_json(folder / "comparison.json", {**COMPARISON, "models": models})
    assert "|  | Bytes | Bits per weight | Perplexity | KL, 99th percentile |\n" in model_card(folder)


def test_card_shows_the_picture_only_where_it_lies(folder: Path) -> None:
    write_json(folder / "comparison.json", COMPARISON)
    picture = "](frontier.png)"
    assert picture not in model_card(folder)
    (folder / "frontier.png").write_bytes(b"a picture")
    assert picture in model_card(folder)
    (folder / "comparison.json").unlink()
    assert picture in model_card(folder)


def test_card_without_a_comparison_has_no_such_section(folder: Path) -> None:
    assert "## Compared" not in model_card(folder)


# Metadata for the Hub


def results(card: str) -> dict[tuple[str, str], Any]:
    """(name of the data set, type of the metric) -> the result as huggingface_hub reads it."""
    evaluated = ModelCard(card).data.eval_results
    assert evaluated is not None
    return {(result.dataset_name, result.metric_type): result for result in evaluated}


def test_model_index_holds_the_scores_as_the_hub_reads_them(folder: Path) -> None:
    write_json(folder / "evaluation.json", EVALUATION)
    write_json(folder / "comparison.json", COMPARISON)
    card = model_card(folder, "me/small")
    wikitext = EVALUATION["text"]
    assert {key: result.metric_value for key, result in results(card).items()} == {
        (wikitext, "perplexity"): 7.126,
        (wikitext, "kl_divergence"): 0.0312,
        (wikitext, "kl_divergence_p99"): 0.2,
        (wikitext, "top1_changed"): 0.085,
        ("piqa", "accuracy"): 0.7812,
        ("arc_easy", "accuracy"): 0.61,
    }
    perplexity = results(card)[wikitext, "perplexity"]
    assert perplexity.task_type == "text-generation"
    assert perplexity.metric_name == "Perplexity"
    dataset = (perplexity.dataset_type, perplexity.dataset_config, perplexity.dataset_split)
    assert dataset == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    name, again = model_index_to_eval_results(front_matter(card)["model-index"])
    assert (name, len(again)) == ("small", 6)


def test_model_index_of_a_comparison_alone_is_this_models_row(folder: Path) -> None:
    write_json(folder / "comparison.json", COMPARISON)
    assert results(model_card(folder))[COMPARISON["text"], "perplexity"].metric_value == 7.13


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("the demo's story generator, evaluation seed", "the-demo-s-story-generator-evaluation-seed"),
        ("/home/carol/my texts/notes.txt", "notes-txt"),
        ("owner/data test", "owner/data"),
        ("an.owner/data test", "an-owner-data-test"),
    ],
)
def test_model_index_calls_a_data_set_what_the_hub_allows(folder: Path, text: str, kind: str) -> None:
    write_json(folder / "evaluation.json", {**EVALUATION, "text": text})
    kinds = {result.dataset_type for result in results(model_card(folder)).values()}
    assert kinds == {kind, "piqa"}
    assert all(re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", kind) for kind in kinds)


def test_model_index_leaves_out_what_is_no_number(folder: Path) -> None:
    (folder / "evaluation.json").write_text('{"perplexity": Infinity, "text": "a", "tasks": {}}', encoding="utf-8")
    assert "model-index" not in model_card(folder)


def test_tags_name_format_and_width(tmp_path: Path, portable: Path, make_folder: Callable[..., Path]) -> None:
    assert front_matter(model_card(portable))["tags"] == ["llmsqueeze", "quantized", "compressed-tensors", "4-bit"]
    assert "2.71-bit" in front_matter(model_card(make_folder(tmp_path / "out", code_bits=2.7123)))["tags"]


def test_library_is_the_one_that_opens_the_folder(folder: Path, portable: Path) -> None:
    assert front_matter(model_card(folder))["library_name"] == "llmsqueeze"
    assert front_matter(model_card(portable))["library_name"] == "transformers"


# Loading and limits


def test_card_of_every_format_has_code_for_all_programs_that_open_it(portable: Path, tmp_path: Path) -> None:
    export(str(portable), "dense", tmp_path / "dense")
    for folder in (portable, tmp_path / "dense"):
        card = model_card(folder, "me/small")
        for snippet in code_blocks(card, "python"):
            compile(snippet, "snippet", "exec")
        for code in ('AutoModelForCausalLM.from_pretrained("me/small")', 'llmsqueeze.load("me/small")'):
            assert any(code in snippet for snippet in code_blocks(card, "python"))
        assert "vllm serve me/small" in card
        assert "import llmsqueeze.hf" not in card
        assert "[!WARNING]" not in card
    assert "pip install 'compressed-tensors>=0.18'" in model_card(portable)


def test_card_of_our_own_format_sends_vllm_through_export(folder: Path) -> None:
    card = model_card(folder, "me/small")
    assert "vllm serve me/small" not in card
    assert "llmsqueeze export model --to compressed-tensors --out portable" in card


def test_limits_have_the_result_of_check(folder: Path, portable: Path) -> None:
    ours, stock = model_card(folder, check=check(str(folder))), model_card(portable, check=check(str(portable)))
    assert "- transformers: needs `import llmsqueeze.hf`; without it the weights are random." in ours
    assert "- vLLM: does not know the llmsqueeze format" in ours
    assert "- transformers: yes, with the package compressed-tensors." in stock
    assert "- Tensor parallelism over 1, 2 devices keeps groups whole." in stock


def test_limits_say_what_it_was_calibrated_and_measured_on(folder: Path) -> None:
    write_json(folder / "evaluation.json", EVALUATION)
    write_json(folder / "comparison.json", COMPARISON)
    card = model_card(folder)
    assert "- Calibrated on Salesforce/wikitext wikitext-2-raw-v1 train. The quality in other languages" in card
    assert "- Measured only on Salesforce/wikitext wikitext-2-raw-v1 test; piqa; arc_easy." in card


def test_linears_of_other_formats_are_counted_too(portable: Path) -> None:
    linears = len(json.loads((portable / "llmsqueeze.json").read_text(encoding="utf-8"))["errors"])
    assert f"| Quantized linear layers |  | {linears} |" in model_card(portable)
