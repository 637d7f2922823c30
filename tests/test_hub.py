"""Push: the card's facts, what the Hub receives, and every refusal in one line.

The pushes run in processes of their own, because huggingface_hub reads HF_ENDPOINT when it is imported; they
talk to `hub_server`, a Hub in small on this machine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hub_server import Hub, serve
from safetensors.numpy import save_file

from llmsqueeze.card import human_bytes, model_card, shown
from llmsqueeze.errors import CheckpointError, HubError, SqueezeError, UnsupportedError
from llmsqueeze.hub import check_folder, check_repo_id, files_to_upload
from llmsqueeze.recipes import make_recipe

ROOT = Path(__file__).parent.parent
TOKEN = "dummy-token-4711"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def push_command(*arguments: str) -> list[str]:
    """The command under test; it takes the arguments of `llmsqueeze push`."""
    return [sys.executable, "-m", "llmsqueeze.cli", "push", *arguments]


def run_push(folder: Path, repo: str, *flags: str, endpoint: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder.parent / "hf_home"),  # a login of whoever runs the tests must not count
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = push_command(str(folder), repo, *flags)
    return subprocess.run(command, env=clean | env, cwd=ROOT, capture_output=True, text=True, timeout=60)


def sidecar() -> dict[str, Any]:
    return {
        "llmsqueeze_version": "0.1.0",
        "format_version": 1,
        "model": "meta-llama/Llama-3.1-8B",
        "revision": "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
        "recipe": {
            "method": "gwq",
            "bits": 3,
            "group_size": 128,
            "symmetric": False,
            "outliers": 0.01,
            "outlier_ranking": "gradient",
            "calibration": None,
            "seed": 0,
            "skip": [],
        },
        "calibration": {
            "source": "Salesforce/wikitext wikitext-2-raw-v1 train",
            "samples": 128,
            "seq_len": 2048,
            "tokens": 262144,
            "sha256": "5e" * 32,
        },
        "bits_per_weight": 3.4125,
        "quantized_weights": 6979321856,
        "nbytes": 4100000000,
        "nbytes_original": 16060522496,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "errors": {"model.layers.0.self_attn.q_proj": 0.0123},
    }


def evaluation() -> dict[str, Any]:
    return {
        "model": "out",
        "perplexity": 7.126,
        "tokens": 12345,
        "kl_mean": 0.0312,
        "kl_p99": 0.2,
        "text": "wikitext-2 test",
        "tasks": {"piqa": {"acc": 0.7812, "acc_stderr": 0.0101, "alias": "piqa"}},
        "baseline": {
            "model": "meta-llama/Llama-3.1-8B",
            "perplexity": 6.244,
            "tokens": 12345,
            "tasks": {"piqa": {"acc": 0.8003, "acc_stderr": 0.01}},
        },
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def make_folder(folder: Path, **changes: Any) -> Path:
    """A folder as `llmsqueeze quantize` leaves it; `changes` go into its sidecar."""
    folder.mkdir(parents=True)
    for seed, shard in enumerate(SHARDS):
        codes = np.random.default_rng(seed).integers(0, 2**31, (16, 3), dtype=np.int32)
        save_file({f"model.layers.{seed}.self_attn.q_proj.affine.codes": codes}, folder / shard)
    weights = {f"model.layers.{i}.self_attn.q_proj.affine.codes": shard for i, shard in enumerate(SHARDS)}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weights})
    parts = [{"part": "affine", "bits": 3, "group_size": 128, "symmetric": False}]
    layers = {f"model.layers.{i}.self_attn.q_proj": parts for i in range(len(SHARDS))}
    quantization = {"quant_method": "llmsqueeze", "format_version": 1, "weights": layers}
    write_json(folder / "config.json", {"model_type": "llama", "quantization_config": quantization})
    write_json(folder / "llmsqueeze.json", sidecar() | changes)
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    write_json(folder / "tokenizer_config.json", {"model_max_length": 2048})
    return folder


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    value = yaml.safe_load(front)
    assert isinstance(value, dict)
    return value


def code_blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "Llama-3.1-8B-3bit")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        running.token = TOKEN
        yield running


# The card


def test_card_front_matter_names_the_original_and_invents_no_license(folder: Path) -> None:
    assert front_matter(model_card(folder)) == {
        "base_model": "meta-llama/Llama-3.1-8B",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmsqueeze", "quantized"],
    }


@pytest.mark.parametrize("model", ["demo", "Llama-3.1-8B"])
def test_card_of_a_local_model_has_no_base_model(tmp_path: Path, model: str) -> None:
    front = front_matter(model_card(make_folder(tmp_path / "out", model=model)))
    assert "base_model" not in front
    assert "base_model_relation" not in front


def test_card_takes_the_license_from_the_sidecar(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out", license="llama3.1")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert front_matter(model_card(folder))["license"] == "llama3.1"


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


def test_card_states_the_sizes(folder: Path) -> None:
    card = model_card(folder)
    original, ours = (
        "16.06 GB (16,060,522,496 bytes)",
        "4.10 GB (4,100,000,000 bytes) (25.5 % of the original)",
    )
    assert f"| All weights | {original} | {ours} |" in card
    assert "| Bits per weight, everything counted |  | 3.41 |" in card
    assert "| Quantized linear layers |  | 2 |" in card
    assert "everything stored for the 6,979,321,856 weights" in card


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB (1,000 bytes)"),
        (2**30, "1.07 GB (1,073,741,824 bytes)"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_card_states_the_scores_before_and_after(folder: Path) -> None:
    write_json(folder / "evaluation.json", evaluation())
    card = model_card(folder)
    assert "| Perplexity | 6.244 | 7.126 |" in card
    assert "| KL divergence, mean | – | 0.0312 |" in card
    assert "| KL, 99th percentile | – | 0.2 |" in card
    assert "| piqa acc | 0.8003 ± 0.01 | 0.7812 ± 0.0101 |" in card
    assert "Text: wikitext-2 test, 12,345 tokens." in card
    assert "llmsqueeze eval" not in card
    assert "alias" not in card


def test_card_without_a_baseline_gives_the_command_that_measures_it(folder: Path) -> None:
    write_json(folder / "evaluation.json", evaluation() | {"baseline": None, "kl_mean": None, "tasks": {}})
    card = model_card(folder)
    assert "| Perplexity | – | 7.126 |" in card
    assert "KL divergence, mean" not in card
    assert "llmsqueeze eval Llama-3.1-8B-3bit --baseline meta-llama/Llama-3.1-8B" in card


@pytest.mark.parametrize("scores", [None, {"perplexity": None, "tasks": {}, "baseline": None}])
def test_card_without_scores_gives_the_command_that_makes_them(folder: Path, scores: dict[str, Any] | None) -> None:
    if scores is not None:
        write_json(folder / "evaluation.json", scores)
    card = model_card(folder, "me/small")
    assert "Not measured yet." in card
    assert "llmsqueeze eval me/small --baseline meta-llama/Llama-3.1-8B" in card
    assert "Perplexity" not in card


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
    assert yaml.safe_load(recipe) == sidecar()["recipe"]
    assert make_recipe(yaml.safe_load(recipe)).bits == 3
    assert "It needs the calibration text" not in card
    (command,) = [line for line in card.splitlines() if line.startswith("llmsqueeze quantize")]
    assert shlex.split(command) == [
        *("llmsqueeze", "quantize", "meta-llama/Llama-3.1-8B", "--recipe", "recipe.yaml"),
        *("--revision", sidecar()["revision"]),
    ]


def test_card_states_calibration_and_versions(folder: Path) -> None:
    card = model_card(folder)
    assert "Salesforce/wikitext wikitext-2-raw-v1 train: 128 samples of 2048 tokens, 262,144 tokens in all." in card
    assert "5e" * 32 in card
    assert "llmsqueeze 0.1.0, format 1, torch 2.13.0, transformers 5.23.0" in card


def test_card_of_a_method_without_calibration_says_so(tmp_path: Path) -> None:
    assert "None: this recipe reads no text." in model_card(make_folder(tmp_path / "out", calibration=None))


def test_card_has_no_absolute_path_user_name_or_token(tmp_path: Path) -> None:
    token = "hf_" + "aB3" * 12
    home = "/home/carol/private"
    recipe = sidecar()["recipe"] | {
        "calibration": f"{home}/notes.txt",
        "note": f"from {home}/a b and {token}",
    }
    calibration = sidecar()["calibration"] | {"source": f"{home}/notes.txt"}
    folder = make_folder(tmp_path / "out", model=f"{home}/tiny", revision=None, recipe=recipe, calibration=calibration)
    scores = evaluation() | {"model": f"{home}/out", "text": f"{home}/eval.txt", "baseline": None}
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


# What is refused before anything is sent


def break_sidecar(folder: Path) -> None:
    (folder / "llmsqueeze.json").unlink()


def break_sidecar_key(folder: Path) -> None:
    write_json(folder / "llmsqueeze.json", {"model": "demo", "recipe": {}})


def break_sidecar_json(folder: Path) -> None:
    (folder / "llmsqueeze.json").write_text('{"model": ', encoding="utf-8")


def break_method(folder: Path) -> None:
    write_json(folder / "config.json", {"quantization_config": {"quant_method": "gptq"}})


def break_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_shard(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def break_index_outside(folder: Path) -> None:
    save_file({"w": np.zeros(1)}, folder.parent / "other.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"w": "../other.safetensors"}})


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (break_sidecar, UnsupportedError, "has no llmsqueeze.json"),
        (break_sidecar_key, CheckpointError, "bits_per_weight, quantized_weights, nbytes, nbytes_original"),
        (break_sidecar_json, CheckpointError, "is not readable JSON"),
        (break_method, UnsupportedError, "quant_method 'gptq'"),
        (break_config, CheckpointError, "has no config.json"),
        (break_shard, CheckpointError, f"lacks {SHARDS[1]}: 1 of the 2 files"),
        (break_index, CheckpointError, "has no model.safetensors.index.json"),
        (break_index_outside, CheckpointError, "names '../other.safetensors'"),
    ],
)
def test_a_folder_that_is_not_a_whole_one_of_ours_is_refused(
    folder: Path, damage: Any, error: type[SqueezeError], words: str
) -> None:
    assert check_folder(folder) == list(SHARDS)
    damage(folder)
    with pytest.raises(error, match=re.escape(words)):
        check_folder(folder)


def test_a_wrong_folder_name_is_answered_with_the_nearest(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"did you mean 'Llama-3\.1-8B-3bit'\?"):
        check_folder(folder.parent / "Llama-3.1-8B-3bits")


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out.partial")
    with pytest.raises(UnsupportedError, match=r"unfinished output .* then push 'out'"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("repo", "guess"),
    [
        ("https://huggingface.co/me/small", "me/small"),
        ("https://huggingface.co/small", "small"),
        ("me/my model", "me/my-model"),
        ("me//small", "me/small"),
        ("./out/small", "out/small"),
        ("me/small--3bit", "me/small-3bit"),
        ("me/small.git", "me/small"),
    ],
)
def test_a_repo_name_that_the_hub_forbids_is_answered_with_the_nearest(repo: str, guess: str) -> None:
    with pytest.raises(HubError, match=re.escape(f"'{repo}' is not a name")) as caught:
        check_repo_id(repo)
    assert f"did you mean '{guess}'?" in str(caught.value)
    check_repo_id(guess)


# Pushes


@dataclass
class Pushed:
    folder: Path
    hub: Hub
    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    """One private push, of a folder that also holds what does not belong into a repo."""
    folder = make_folder(tmp_path_factory.mktemp("pushed") / "Llama-3.1-8B-3bit")
    write_json(folder / "evaluation.json", evaluation())
    (folder / "README.md").write_text("---\nlicense: llama3.1\n---\n# The original\n", encoding="utf-8")
    (folder / "LICENSE").write_text("terms\n", encoding="utf-8")
    for stray in (
        ".env",
        "notes.txt",
        "run.log",
        "tokenizer.json.partial",
        "model-00003-of-00003.safetensors",
    ):
        (folder / stray).write_text("not for the Hub", encoding="utf-8")
    (folder / "backup").mkdir()
    (folder / "backup" / "config.json").write_text("{}", encoding="utf-8")
    with serve() as hub:
        hub.token = TOKEN
        result = run_push(folder, "alice/small", "--private", endpoint=hub.url)
        yield Pushed(folder, hub, result)


def test_push_prints_the_url(pushed: Pushed) -> None:
    assert pushed.result.returncode == 0, pushed.result.stderr
    assert pushed.result.stdout == f"{pushed.hub.url}/alice/small\n"


def test_push_sends_the_shards_through_lfs_unchanged(pushed: Pushed) -> None:
    assert pushed.hub.large == {shard: (pushed.folder / shard).read_bytes() for shard in SHARDS}
    assert pushed.hub.verified == set(pushed.hub.objects)


def test_push_sends_the_small_files_that_belong_unchanged_and_no_other(pushed: Pushed) -> None:
    names = (
        *("LICENSE", "README.md", "config.json", "evaluation.json", "llmsqueeze.json"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
    )
    assert pushed.hub.inline == {name: (pushed.folder / name).read_bytes() for name in names}


def test_push_sends_the_card_and_keeps_the_readme_that_was_there(pushed: Pushed) -> None:
    card = pushed.hub.inline["README.md"].decode()
    assert card == model_card(pushed.folder, "alice/small")
    assert front_matter(card)["license"] == "llama3.1"
    for fact in ("method: gwq", "bits: 3", "4.10 GB", "3.41", "7.126", 'llmsqueeze.load("alice/small")'):
        assert fact in card
    assert (pushed.folder / "README.before-push.md").read_text(encoding="utf-8").endswith("# The original\n")


def test_push_asks_for_a_private_repo(pushed: Pushed) -> None:
    assert pushed.hub.created == [{"name": "small", "organization": "alice", "visibility": "private"}]
    assert pushed.hub.visibility == {"alice/small": "private"}


def test_push_never_shows_the_token(pushed: Pushed) -> None:
    sent = b"".join([*pushed.hub.inline.values(), *pushed.hub.large.values()])
    assert TOKEN.encode() not in sent
    assert TOKEN not in pushed.result.stdout + pushed.result.stderr
    assert not any(TOKEN in path.read_text(encoding="latin-1") for path in pushed.folder.glob("*.*"))


def test_push_twice_without_an_owner_leaves_visibility_to_the_hub(folder: Path, hub: Hub) -> None:
    for _ in range(2):
        result = run_push(folder, "small", endpoint=hub.url)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{hub.url}/alice/small\n"
    assert "visibility" not in hub.created[0]
    assert 'llmsqueeze.load("alice/small")' in hub.inline["README.md"].decode()
    assert not (folder / "README.before-push.md").exists()


@pytest.mark.parametrize("has_code", [False, True])
def test_code_belongs_only_to_a_model_that_names_its_own(folder: Path, has_code: bool) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | ({"auto_map": {"AutoConfig": "own.Own"}} if has_code else {}))
    (folder / "own.py").touch()
    assert ("own.py" in files_to_upload(folder, [])) == has_code


def test_push_private_to_a_public_repo_sends_nothing(folder: Path, hub: Hub) -> None:
    hub.visibility["alice/small"] = "public"
    result = run_push(folder, "alice/small", "--private", endpoint=hub.url)
    assert_refused(result, "'alice/small' exists and is public")
    assert not hub.inline
    assert not hub.large


# Refusals of the Hub


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, one line that holds the words, no traceback, no token."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    message = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in message
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stderr


def test_no_login_is_refused_before_any_call(folder: Path, hub: Hub) -> None:
    result = run_push(folder, "alice/small", endpoint=hub.url, HF_TOKEN="")
    assert_refused(result, "not logged in", "`hf auth login`", "HF_TOKEN")
    assert hub.calls == []


def test_a_bad_folder_is_refused_before_any_call(folder: Path, hub: Hub) -> None:
    break_shard(folder)
    assert_refused(run_push(folder, "alice/small", endpoint=hub.url), SHARDS[1])
    assert hub.calls == []


def test_401_says_how_to_log_in(folder: Path, hub: Hub) -> None:
    # this server's message quotes the token, which must not come through
    hub.token = "another"
    result = run_push(folder, "alice/small", endpoint=hub.url)
    assert_refused(result, "does not accept your token", "Bearer ...", "`hf auth login`", "HF_TOKEN")
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_403_for_the_repo_of_another_names_ones_own(folder: Path, hub: Hub, exists: bool) -> None:
    if exists:
        hub.visibility["bob/small"] = "public"
    result = run_push(folder, "bob/small", endpoint=hub.url)
    assert_refused(result, "may not write to 'bob/small'", "push to 'alice/small'")
    assert not hub.inline


def test_403_for_ones_own_repo_asks_for_a_write_token(folder: Path, hub: Hub) -> None:
    hub.failures["/repos/create"] = (403, "read-only token")
    result = run_push(folder, "alice/small", endpoint=hub.url)
    assert_refused(result, "may not write to 'alice/small'", "read-only token", "token with write access to it")


def test_a_failure_in_the_middle_of_the_upload_is_explained(folder: Path, hub: Hub) -> None:
    hub.failures["/verify/"] = (413, "storage is full")
    result = run_push(folder, "alice/small", endpoint=hub.url)
    assert_refused(result, "the Hub answered 413 for 'alice/small'", "storage is full")
    assert not hub.inline


def test_a_hub_that_is_down_is_reported_without_retries(folder: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        # bound but not listening: the connection is refused, and no one else can take the port
        result = run_push(folder, "alice/small", endpoint=endpoint)
    assert_refused(result, f"cannot reach the Hub at {endpoint}", "HF_ENDPOINT")
    assert "Retry" not in result.stderr


def test_offline_mode_is_named(folder: Path, hub: Hub) -> None:
    result = run_push(folder, "alice/small", endpoint=hub.url, HF_HUB_OFFLINE="1")
    assert_refused(result, "offline mode is on", "HF_HUB_OFFLINE")
    assert hub.calls == []
