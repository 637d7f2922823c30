"""Push: what the Hub receives, who sees it, the state after an interrupted push, and dry runs.

The pushes talk to `hub_server`, a small Hub on this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_folder import (
    COMPARISON,
    EVALUATION,
    SHARDS,
    TOKEN,
    assert_refused,
    contents,
    front_matter,
    run_push,
    write_json,
)
from hub_server import Hub, serve
from huggingface_hub import HfApi

from llmsqueeze.formats.check import check
from llmsqueeze.publish.card import model_card

# Pushes

COMMIT = "POST /api/models/alice/small/commit/main"


@dataclass
class Pushed:
    folder: Path
    hub: Hub
    preview: dict[str, Any]
    result: tuple[int, str, str]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[..., Path]) -> Iterator[Pushed]:
    """One private push, after a dry run, of a folder that also has files that do not belong into a repository."""
    folder = make_folder(tmp_path_factory.mktemp("pushed") / "Llama-3.1-8B-3bit")
    write_json(folder / "evaluation.json", EVALUATION)
    write_json(folder / "comparison.json", COMPARISON)
    (folder / "frontier.png").write_bytes(b"a picture")
    (folder / "README.md").write_text("---\nlicense: llama3.1\n---\n# The original\n", encoding="utf-8")
    (folder / "LICENSE").write_text("terms\n", encoding="utf-8")
    for stray in (
        ".env",
        "notes.txt",
        "run.log",
        "tokenizer.json.partial",
        "model-00001-of-00007.safetensors",
    ):
        (folder / stray).write_text("not for the Hub", encoding="utf-8")
    (folder / "backup").mkdir()
    (folder / "backup" / "config.json").write_text("{}", encoding="utf-8")
    with serve() as hub:
        hub.token = TOKEN
        preview = json.loads(run_push(folder, "alice/small", "--private", "--dry-run", "--json", endpoint=hub.url)[1])
        assert hub.calls == []
        result = run_push(folder, "alice/small", "--private", endpoint=hub.url)
        yield Pushed(folder, hub, preview, result)


def test_push_prints_where_it_went_who_sees_it_and_how_much_it_was(pushed: Pushed) -> None:
    assert pushed.result[0] == 0, pushed.result[2]
    nbytes = sum(map(len, [*pushed.hub.inline.values(), *pushed.hub.large.values()]))
    summary = pushed.result[1]
    assert summary.startswith(f"{pushed.hub.url}/alice/small (private): 14 files, ")
    assert summary.endswith(f"({nbytes:,} bytes)\n")


def test_push_sends_the_shards_through_lfs_unchanged(pushed: Pushed) -> None:
    assert pushed.hub.large == {shard: (pushed.folder / shard).read_bytes() for shard in SHARDS}
    assert pushed.hub.verified == set(pushed.hub.objects)
    assert not any(call.startswith("PUT") for call in pushed.hub.calls[pushed.hub.calls.index(COMMIT) :])


def test_push_changes_the_repo_in_one_step(pushed: Pushed) -> None:
    assert pushed.hub.commits == 1


def test_push_sends_the_small_files_that_belong_unchanged_and_no_other(pushed: Pushed) -> None:
    names = (
        *("LICENSE", "README.md", "config.json", "evaluation.json", "frontier.png", "generation_config.json"),
        *("llmsqueeze.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
    )
    sent = dict(pushed.hub.inline)
    del sent["comparison.json"]
    assert sent == {name: (pushed.folder / name).read_bytes() for name in names}


def test_push_sends_the_comparison_without_the_maker_s_folders(pushed: Pushed) -> None:
    sent = json.loads(pushed.hub.inline["comparison.json"])
    assert [row["model"] for row in sent["models"]] == ["meta-llama/Llama-3.1-8B", "Llama-3bit", "other"]
    assert sent["models"][1]["perplexity"] == 7.13


def test_push_sends_the_card_and_keeps_the_readme_that_was_there(pushed: Pushed) -> None:
    card = pushed.hub.inline["README.md"].decode()
    assert card == model_card(pushed.folder, "alice/small", check(str(pushed.folder)))
    assert front_matter(card)["license"] == "llama3.1"
    for fact in (
        "method: gwq",
        "bits: 3",
        "7.126",
        "](frontier.png)",
        "**7.130 ± 0.060**",
        'llmsqueeze.load("alice/small")',
    ):
        assert fact in card
    assert (pushed.folder / "README.before-push.md").read_text(encoding="utf-8").endswith("# The original\n")


def test_push_asks_for_a_private_repo(pushed: Pushed) -> None:
    assert pushed.hub.created == [{"name": "small", "organization": "alice", "visibility": "private"}]
    assert pushed.hub.visibility == {"alice/small": "private"}


def test_a_dry_run_previews_the_push(pushed: Pushed) -> None:
    assert pushed.preview["card"] == (pushed.folder / "README.md").read_text(encoding="utf-8")
    assert pushed.preview["files"] == {n: len(c) for n, c in (pushed.hub.inline | pushed.hub.large).items()}
    assert pushed.preview["nbytes"] == sum(pushed.preview["files"].values())
    assert (pushed.preview["private"], pushed.preview["dry_run"]) == (True, True)
    assert pushed.preview["url"] == f"{pushed.hub.url}/alice/small"


def test_push_never_shows_the_token(pushed: Pushed) -> None:
    sent = b"".join([*pushed.hub.inline.values(), *pushed.hub.large.values()])
    assert TOKEN.encode() not in sent
    assert TOKEN not in pushed.result[1] + pushed.result[2]
    assert not any(TOKEN.encode() in content for content in contents(pushed.folder).values())


def test_push_leaves_nothing_behind_in_the_folder(pushed: Pushed) -> None:
    hidden = [name for name in contents(pushed.folder) if name.startswith(".")]
    assert hidden == [".env"]
    assert check(str(pushed.folder))["sound"]


def test_push_twice_without_an_owner_sends_nothing_the_second_time(folder: Path, hub: Hub) -> None:
    for flags, there in (([], False), (["--private"], True)):  # a flag that fits the repository changes nothing
        result = run_push(folder, "small", *flags, endpoint=hub.url)
        assert result[0] == 0, result[2]
        assert result[1].startswith(f"{hub.url}/alice/small (private): ")
        assert ("not sent again: 3 of 3 files of weights" in result[1]) is there
    assert 'llmsqueeze.load("alice/small")' in hub.inline["README.md"].decode()
    assert not (folder / "README.before-push.md").exists()
    assert [sent(hub, shard, folder) for shard in SHARDS] == [1] * len(SHARDS)
    assert hub.commits == 1


# Who sees it


@pytest.mark.parametrize(
    ("flags", "there", "after"),
    [
        (["--public"], None, "public"),
        ([], "public", "public"),
    ],
)
def test_a_new_repo_is_private_unless_asked_and_one_that_exists_stays(
    folder: Path, hub: Hub, flags: list[str], there: str | None, after: str
) -> None:
    if there:
        hub.visibility["alice/small"] = there
        hub.inline |= {"notes.md": b"mine", "config.json": b"old"}
    result = run_push(folder, "alice/small", *flags, "--json", endpoint=hub.url)
    assert result[0] == 0, result[2]
    assert hub.visibility == {"alice/small": after}
    summary = json.loads(result[1])
    assert summary["private"] == (after == "private")
    assert (summary["repo"], summary["url"], summary["dry_run"]) == ("alice/small", f"{hub.url}/alice/small", False)
    assert hub.inline["config.json"] == (folder / "config.json").read_bytes()
    assert hub.inline.pop("notes.md", b"mine") == b"mine", "a foreign file stays"
    assert summary["files"] == {name: len(content) for name, content in (hub.inline | hub.large).items()}
    assert summary["nbytes"] == sum(summary["files"].values())


@pytest.mark.parametrize(("flag", "there"), [("--private", "public"), ("--public", "private")])
def test_a_flag_against_a_repo_that_exists_sends_nothing(folder: Path, hub: Hub, flag: str, there: str) -> None:
    hub.visibility["alice/small"] = there
    before = contents(folder)
    result = run_push(folder, "alice/small", flag, endpoint=hub.url)
    assert_refused(result, f"'alice/small' exists and is {there}", f"omit {flag}")
    assert (hub.inline, hub.large, hub.objects) == ({}, {}, {})
    assert contents(folder) == before


def test_weights_in_the_repo_that_would_be_opened_instead_are_named(folder: Path, hub: Hub) -> None:
    hub.visibility["alice/small"] = "public"
    hub.pointers["model.safetensors"] = "0" * 64
    result = run_push(folder, "alice/small", endpoint=hub.url)
    assert_refused(result, "'alice/small' contains model.safetensors", "delete it there, or push to a new name")
    assert hub.objects == {}


# Broken off


def sent(hub: Hub, shard: str, folder: Path) -> int:
    """How often the shard was sent, or begun to be."""
    return hub.calls.count(f"PUT /lfs/{hashlib.sha256((folder / shard).read_bytes()).hexdigest()}")


def test_a_broken_connection_loses_nothing_and_the_next_push_goes_on(folder: Path, hub: Hub) -> None:
    hub.visibility["alice/small"] = "public"
    hub.inline["README.md"] = b"as it was"
    hub.room = 1
    result = run_push(folder, "alice/small", endpoint=hub.url)
    assert_refused(result, f"cannot reach the Hub at {hub.url}", "the repository did not change", "not sent again")
    assert sent(hub, SHARDS[0], folder) == 1
    assert sent(hub, SHARDS[1], folder) > 1
    assert sent(hub, SHARDS[2], folder) == 0
    assert (hub.inline, hub.large, hub.commits) == ({"README.md": b"as it was"}, {}, 0)
    assert check(str(folder))["sound"]

    hub.room = None
    hub.calls.clear()
    result = run_push(folder, "alice/small", endpoint=hub.url)
    assert result[0] == 0, result[2]
    assert [sent(hub, shard, folder) for shard in SHARDS] == [0, 1, 1]
    nbytes = (folder / SHARDS[0]).stat().st_size
    assert "not sent again: 1 of 3 files of weights, " in result[1]
    assert result[1].endswith(f"({nbytes:,} bytes), which the Hub had already\n")
    assert hub.large == {shard: (folder / shard).read_bytes() for shard in SHARDS}
    assert hub.inline["README.md"] == (folder / "README.md").read_bytes()


def test_an_interrupted_push_says_that_the_same_command_goes_on(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, done = HfApi.preupload_lfs_files, list[str]()

    def interrupted(api: HfApi, repo: str, additions: Any, **more: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.extend(addition.path_in_repo for addition in additions)
        upload(api, repo, additions, **more)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", interrupted)
    code, stdout, stderr = run_push(folder, "alice/small", endpoint=hub.url)
    assert (code, stdout) == (130, "")
    said = " ".join(stderr.split())
    assert "interrupted; the repository did not change, and the same command continues from there" in said
    assert (hub.inline, hub.large, hub.commits) == ({}, {}, 0), "no card of weights that are not there"
    monkeypatch.undo()
    code, stdout, stderr = run_push(folder, "alice/small", "--json", endpoint=hub.url)
    assert code == 0, stderr
    assert json.loads(stdout)["there"] == done == [*SHARDS[:2]]


def test_a_token_that_expires_loses_nothing_and_a_new_one_goes_on(folder: Path, hub: Hub) -> None:
    hub.expires = (2, "")
    result = run_push(folder, "alice/small", endpoint=hub.url)
    assert_refused(
        result,
        "does not accept your token",
        "`hf auth login`",
        "HF_TOKEN",
        "the repository did not change",
        "not sent again",
    )
    assert (hub.inline, hub.large, len(hub.verified)) == ({}, {}, 2)

    hub.expires, hub.token = None, "new-token-4712"
    hub.calls.clear()
    result = run_push(folder, "alice/small", endpoint=hub.url, HF_TOKEN=hub.token)
    assert result[0] == 0, result[2]
    assert [sent(hub, shard, folder) for shard in SHARDS] == [0, 0, 1]
    assert hub.commits == 1


def test_a_commit_that_fails_loses_nothing_and_the_next_push_sends_no_weights(folder: Path, hub: Hub) -> None:
    hub.failures["/commit/"] = (412, "the repo is locked")
    result = run_push(folder, "alice/small", endpoint=hub.url)
    assert_refused(result, "the Hub answered 412 for 'alice/small'", "the repo is locked", "not sent again")
    assert hub.inline == {}

    hub.failures.clear()
    hub.calls.clear()
    result = run_push(folder, "alice/small", "--json", endpoint=hub.url)
    assert result[0] == 0, result[2]
    assert json.loads(result[1])["there"] == [*SHARDS]
    assert [sent(hub, shard, folder) for shard in SHARDS] == [0] * len(SHARDS)
    assert set(hub.large) == set(SHARDS)


def test_xet_goes_on_too_and_its_401_is_understood(folder: Path, hub: Hub) -> None:
    """The Hub's chunked storage, which huggingface_hub takes unless summary otherwise."""
    hub.expires = (1, "xet-write-token")
    result = run_push(folder, "alice/small", endpoint=hub.url, HF_HUB_DISABLE_XET="0")
    assert_refused(
        result, "does not accept your token", "`hf auth login`", "the repository did not change", "not sent again"
    )
    assert (hub.inline, hub.pointers) == ({}, {})
    arrived = set(hub.xorbs)
    assert len(arrived) == 1

    hub.expires = None
    hub.calls.clear()
    result = run_push(folder, "alice/small", endpoint=hub.url, HF_HUB_DISABLE_XET="0")
    assert result[0] == 0, result[2]
    blocks = [call for call in hub.calls if call.startswith("POST /cas/v1/xorbs/")]
    assert len(blocks) == len(SHARDS) - 1
    assert not any(name in call for name in arrived for call in blocks)
    assert hub.pointers == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SHARDS}
    assert not any(call.startswith("PUT") for call in hub.calls)


# Dry runs


def test_a_dry_run_sends_and_writes_nothing_and_says_what_a_push_would(folder: Path, hub: Hub) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    (folder / "notes.txt").write_text("not for the Hub", encoding="utf-8")
    before = contents(folder)
    result = run_push(folder, "alice/small", "--dry-run", endpoint=hub.url, HF_TOKEN="")
    assert result[0] == 0, result[2]
    assert hub.calls == []
    assert contents(folder) == before
    for shard in SHARDS:
        assert re.search(rf"^  {shard} +{(folder / shard).stat().st_size:,}$", result[1], re.MULTILINE)
    assert "notes.txt" not in result[1]
    assert f"{folder / 'README.md'} " in result[1]
    assert "base_model: meta-llama/Llama-3.1-8B\n" in result[1]
    last = result[1].splitlines()[-1]
    assert f"{hub.url}/alice/small (private if it is new) would get 10 files, " in last


def test_a_dry_run_refuses_what_the_push_would(folder: Path, hub: Hub) -> None:
    (folder / SHARDS[1]).unlink()
    assert_refused(run_push(folder, "alice/small", "--dry-run", endpoint=hub.url), SHARDS[1])
