"""Refusals of a push, before any call and by the Hub. Each is one line.

The pushes talk to `hub_server`, a small Hub on this machine.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_folder import (
    SHARDS,
    assert_refused,
    contents,
    run_push,
    write_json,
)
from hub_server import Hub
from safetensors.torch import load_file, save_file

from llmsqueeze.errors import CheckpointError, HubError, SqueezeError, UnsupportedError
from llmsqueeze.publish.push import check_folder, check_repo_id, files_to_upload

# Refusals before any call


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
    save_file({"w": torch.zeros(1)}, folder.parent / "other.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"w": "../other.safetensors"}})


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (break_sidecar, UnsupportedError, "has no llmsqueeze.json"),
        (break_sidecar_key, CheckpointError, "bits_per_weight, quantized_weights, nbytes, nbytes_original"),
        (break_sidecar_json, CheckpointError, "is not readable JSON"),
        (break_method, UnsupportedError, "quant_method 'gptq'"),
        (break_config, CheckpointError, "has no config.json"),
        (break_shard, CheckpointError, f"lacks {SHARDS[1]}: 1 of the 3 files"),
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


def test_an_unfinished_folder_is_refused(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
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


@pytest.mark.parametrize("has_code", [False, True])
def test_code_belongs_only_to_a_model_that_names_its_own(folder: Path, has_code: bool) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | ({"auto_map": {"AutoConfig": "own.Own"}} if has_code else {}))
    (folder / "own.py").touch()
    assert ("own.py" in files_to_upload(folder, [])) == has_code


# Refusals of the Hub


def test_no_login_is_refused_before_any_call(folder: Path, hub: Hub) -> None:
    result = run_push(folder, "alice/small", endpoint=hub.url, HF_TOKEN="")
    assert_refused(result, "not logged in", "`hf auth login`", "HF_TOKEN")
    assert hub.calls == []


def test_a_bad_folder_is_refused_before_any_call(folder: Path, hub: Hub) -> None:
    folder = folder.rename(folder.with_name("out.partial"))
    assert_refused(run_push(folder, "alice/small", endpoint=hub.url), "unfinished output")
    assert hub.calls == []


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_an_unsound_folder_is_refused_before_any_call(folder: Path, hub: Hub, flags: list[str]) -> None:
    tensors = load_file(folder / SHARDS[1])
    name = next(name for name in sorted(tensors) if name.endswith(".scale"))
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, folder / SHARDS[1], {"format": "pt"})
    before = contents(folder)
    result = run_push(folder, "alice/small", *flags, endpoint=hub.url)
    assert_refused(
        result, f"'{folder}' is not sound", f"{name} holds zeros", f"`llmsqueeze check {folder}` lists all errors"
    )
    assert hub.calls == []
    assert contents(folder) == before


def test_a_card_that_the_hub_refuses_is_reported_before_the_weights_are_sent(
    tmp_path: Path, hub: Hub, make_folder: Callable[..., Path]
) -> None:
    folder = make_folder(tmp_path / "out", license="unheard-of")
    result = run_push(folder, "alice/small", endpoint=hub.url)
    assert_refused(result, "the Hub refuses the model card's metadata", '\\"license\\" must be one of')
    assert hub.objects == {}
    assert not (folder / "README.md").exists()


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


def test_a_namespace_that_is_not_there_is_named(folder: Path, hub: Hub) -> None:
    hub.failures["/repos/create"] = (404, "no such organization: nobody")
    result = run_push(folder, "nobody/small", endpoint=hub.url)
    assert_refused(result, "the Hub has no 'nobody/small'", "no such organization: nobody", "push to 'alice/small'")


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
    assert "Retry" not in result[2]


def test_offline_mode_is_named(folder: Path, hub: Hub) -> None:
    result = run_push(folder, "alice/small", endpoint=hub.url, HF_HUB_OFFLINE="1")
    assert_refused(result, "offline mode is on", "HF_HUB_OFFLINE")
    assert hub.calls == []
