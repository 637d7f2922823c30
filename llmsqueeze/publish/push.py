"""`llmsqueeze push`: upload a compressed folder to the Hugging Face Hub. No other file uploads.

Order: first all checks without the network, then the repository and the card's metadata, then each file of weights
into the Hub's storage, then one commit with all files. The repository changes in one step: an interrupted push changes
nothing in it, and a file that is in the storage is not sent again. The first request has no retries, so an error
message comes at once if the Hub cannot be reached. huggingface_hub retries only the upload.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from llmsqueeze.errors import CheckpointError, HubError, OutputError, UnsupportedError
from llmsqueeze.files import COMPARISON, EVALUATION, FRONTIER, INDEX, SIDECAR, SINGLE, read_json, write_text
from llmsqueeze.formats.entries import DENSE, FORMATS
from llmsqueeze.formats.inspection.beside import refuse_outside
from llmsqueeze.formats.public import shown
from llmsqueeze.progress import Progress
from llmsqueeze.publish.card import MARK, model_card
from llmsqueeze.publish.folder import complete_record
from llmsqueeze.publish.hub_errors import hub_errors
from llmsqueeze.publish.numbers import exact_size

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

README = "README.md"
KEPT_README = "README.before-push.md"
OURS = (SIDECAR, EVALUATION, COMPARISON)  # our JSON files, which are sent without local paths and tokens
# The files that may leave the disk beside the shards. It is a list of allowed names, because a folder may also have
# logs, notes, or the shards of an earlier run.
UPLOADED = (
    *("config.json", "generation_config.json", README, INDEX, FRONTIER, *OURS),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json"),
    *("*LICENSE*", "*LICENCE*", "*NOTICE*", "USE_POLICY*"),
)
RESUME = "the same command continues from there: a file that has arrived is not sent again"


def push(
    directory: Path,
    repo: str,
    private: bool | None = None,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Uploads a compressed folder and its model card to `repo` on the Hub; returns a summary.

    `private`: None makes a new repository private and does not change one that exists. `dry_run`: no request, no
    change. Writes README.md into the folder; a README.md that is not ours is renamed README.before-push.md.

    Raises UnsupportedError for a folder that is not ours, CheckpointError for a damaged one, OutputError if the card
    cannot be written, HubError if the Hub cannot be reached or refuses.
    """
    shards = check_folder(directory)
    check_repo_id(repo)
    model_card(directory, repo)  # its errors come before the long check of the weights
    token = None if dry_run else _token()
    check = _check(directory, trust_remote_code)

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    if dry_run:
        return _preview(directory, repo, private, shards, model_card(directory, repo, check), api.endpoint)
    with hub_errors(api, repo):
        url = api.create_repo(repo, private=private is not False, exist_ok=True)
        is_private = _check_repo(api, url.repo_id, private)
    card = model_card(directory, url.repo_id, check)
    with hub_errors(api, url.repo_id):
        _check_metadata(card)
    write_card(directory, card)
    names = files_to_upload(directory, shards)
    there = _upload(api, url.repo_id, directory, names, shards, progress or Progress())
    sizes = {name: _nbytes(directory / name) for name in names}
    return _summary(url.repo_id, str(url), is_private, sizes, there, dry_run=False)


def _check(directory: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The result of `llmsqueeze check`. Raises CheckpointError for a folder that is not sound."""
    from llmsqueeze.formats.check import check

    result = check(str(directory), trust_remote_code=trust_remote_code)
    if not result["sound"]:
        errors = result["errors"] or [result["unknown"]]
        more, state = len(errors) - 1, "is not sound" if result["errors"] else "cannot be checked"
        raise CheckpointError(
            f"'{directory}' {state}, nothing was sent: {errors[0]}"
            + (f" (and {more} more)" if more else "")
            + f"; `llmsqueeze check {directory}` lists all errors"
        )
    return result


def _check_repo(api: HfApi, repo: str, private: bool | None) -> bool:
    """Whether the repository is private. Raises HubError if it cannot take this push."""
    info = api.model_info(repo)
    if private is not None and private != info.private:
        old, flag, new = ("private", "--public", "public") if info.private else ("public", "--private", "private")
        raise HubError(
            f"'{repo}' exists and is {old}, and {flag} does not change a repository that exists; "
            f"make it {new} in its settings on the Hub, push to a new name, or omit {flag}"
        )
    if SINGLE in (file.rfilename for file in info.siblings or []):
        raise HubError(
            f"'{repo}' contains {SINGLE}, which programs would open instead of the pushed weights; "
            "delete it there, or push to a new name"
        )
    return bool(info.private)


def _check_metadata(card: str) -> None:
    """Raises ValueError for a card that the Hub would refuse, before the weights are sent."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(card).validate()
    except ValueError as error:
        raise ValueError(f"the Hub refuses the model card's metadata: {error}") from error


def _upload(
    api: HfApi, repo: str, directory: Path, names: list[str], shards: list[str], progress: Progress
) -> list[str]:
    """Sends what the Hub lacks, and commits all; the files of weights that the Hub had."""
    from huggingface_hub import CommitOperationAdd

    there: list[str] = []
    with hub_errors(api, repo, f"the repository did not change, and {RESUME}"):
        files = {name: CommitOperationAdd(name, _content(directory / name)) for name in names}
        # one after the other: if the connection breaks, the files before are complete
        for shard in progress.over(shards, "sending weights, by file", len(shards)):
            there += [shard] if _is_stored(api, repo, files[shard]) else []
            api.preupload_lfs_files(repo, [files[shard]], free_memory=False)
    with hub_errors(api, repo, RESUME):
        api.create_commit(repo, list(files.values()), commit_message="Upload a model compressed by llmsqueeze")
    return there


def _is_stored(api: HfApi, repo: str, file: CommitOperationAdd) -> bool:
    """Whether the Hub's storage has the content of a file, from this repository or from a push that was interrupted.

    It only tells: huggingface_hub asks again before it sends. So a Hub that does not answer costs nothing here.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.lfs import post_lfs_batch_info

    about: dict[str, Any] = {"token": api.token, "repo_type": "model", "repo_id": repo, "endpoint": api.endpoint}
    try:
        wanted, *_ = post_lfs_batch_info([file.upload_info], **about)
    except HfHubHTTPError:
        return False
    return bool(wanted) and not any(one.get("actions") for one in wanted)


def _content(path: Path) -> Path | bytes:
    """The content to send: the file, or for a JSON of ours the text without local paths and tokens."""
    if path.name in OURS:
        value = read_json(path)
        if shown(value) != value:
            return (json.dumps(shown(value), indent=2, ensure_ascii=False) + "\n").encode()
    return path


def _nbytes(path: Path) -> int:
    content = _content(path)
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _preview(
    directory: Path, repo: str, private: bool | None, shards: list[str], card: str, endpoint: str
) -> dict[str, Any]:
    """The summary of a push that is not done, and its card."""
    sizes = {name: _nbytes(directory / name) for name in files_to_upload(directory, shards) if name != README}
    sizes = dict(sorted((sizes | {README: len(card.encode())}).items()))
    return _summary(repo, f"{endpoint}/{repo}", private, sizes, [], dry_run=True) | {"card": card}


def _summary(
    repo: str, url: str, private: bool | None, files: dict[str, int], there: list[str], dry_run: bool
) -> dict[str, Any]:
    nbytes = sum(files.values())
    about = {"repo": repo, "url": url, "private": private, "files": files, "nbytes": nbytes}
    return about | {"there": there, "dry_run": dry_run}


def describe(pushed: dict[str, Any], directory: Path) -> str:
    """The text for the terminal of a summary from `push`."""
    total = f"{len(pushed['files'])} files, {exact_size(pushed['nbytes'])}"
    if not pushed["dry_run"]:
        return f"{pushed['url']} ({'private' if pushed['private'] else 'public'}): {total}{_said_of_there(pushed)}"
    access = {True: "private", False: "public", None: "private if it is new"}[pushed["private"]]
    width = max(len(name) for name in pushed["files"])
    _, front, _ = pushed["card"].split("---\n", 2)
    return "\n".join(
        [
            *(f"  {name:{width}}  {nbytes:>15,}" for name, nbytes in pushed["files"].items()),
            f"\nA push writes the card to {directory / README} ({pushed['files'][README]:,} bytes). Its metadata:\n",
            front,
            f"dry run, nothing was sent or written: {pushed['url']} ({access}) would get {total}",
        ]
    )


def _said_of_there(pushed: dict[str, Any]) -> str:
    """What the Hub had already of the weights; empty if nothing."""
    if not (there := pushed["there"]):
        return ""
    size, weights = exact_size(sum(pushed["files"][name] for name in there)), weight_files(pushed["files"])
    return f"\nnot sent again: {len(there)} of {len(weights)} files of weights, {size}, which the Hub had already"


def weight_files(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


def check_folder(directory: Path) -> list[str]:
    """The names of the shards. Raises UnsupportedError for a folder that is not ours, CheckpointError for a damaged
    one.
    """
    record = complete_record(directory)
    name = directory.resolve().name
    if name.endswith(".partial"):
        raise UnsupportedError(
            f"'{directory}' is the unfinished output of `llmsqueeze quantize`; run that command again to "
            f"complete it, then push '{name.removesuffix('.partial')}'"
        )
    form = record.get("format", "llmsqueeze")
    config = directory / "config.json"
    if not config.is_file():
        raise CheckpointError(f"'{directory}' has no config.json; run `llmsqueeze quantize` again to write it")
    quantization = read_json(config).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in (*FORMATS, None) or (method or DENSE) != form:
        raise UnsupportedError(
            f"'{config}' has quant_method {method!r}, but {SIDECAR} has {form!r}; push uploads only folders that "
            "llmsqueeze wrote (`hf upload` uploads other folders)"
        )
    return _shards(directory)


def _shards(directory: Path) -> list[str]:
    """The names of the weight files. Raises CheckpointError if one is missing."""
    index = directory / INDEX
    if not index.is_file():
        raise CheckpointError(f"'{directory}' has no {INDEX}; run `llmsqueeze quantize` again to write it")
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"'{index}' has no weight_map; run `llmsqueeze quantize` again to write it")
    shards = sorted({str(name) for name in weights.values()})
    # an index is only text: it must not make us upload a file outside the folder
    if outside := [name for name in shards if PurePath(name).name != name or not name.endswith(".safetensors")]:
        raise CheckpointError(f"'{index}' names '{outside[0]}'; only .safetensors files in the folder are allowed")
    if missing := [name for name in shards if not (directory / name).is_file()]:
        raise CheckpointError(
            f"'{directory}' lacks {', '.join(missing)}: {len(missing)} of the {len(shards)} files in "
            f"{INDEX}; run `llmsqueeze quantize` again, or copy the whole folder"
        )
    return shards


def check_repo_id(repo: str) -> None:
    """Raises HubError if the Hub does not allow the name `repo`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        words = re.sub(r"^\w+://[^/]*/", "", repo).split("/")
        clean = [re.sub(r"[^\w.]+|\.\.+", "-", word, flags=re.ASCII).strip("-.") for word in words]
        guess = "/".join([word for word in clean if word][-2:]).removesuffix(".git")[:96]
        raise HubError(
            f"'{repo}' is not a name for a repository on the Hub; allowed is 'owner/name' of at most 96 letters, "
            "digits, '-', '_' and '.', without '--' or '..', and no '-' or '.' at either end"
            + (f"; did you mean '{guess}'?" if guess else "")
        ) from error


def write_card(directory: Path, card: str) -> None:
    """Writes README.md. One that is not ours is first renamed README.before-push.md. Raises OutputError."""
    readme = directory / README
    try:
        if readme.is_file() and MARK not in readme.read_text(encoding="utf-8", errors="replace"):
            readme.replace(directory / KEPT_README)
    except OSError as error:
        raise OutputError(f"the model card '{readme}' cannot be written: {error.strerror}") from error
    write_text(readme, card)


def files_to_upload(directory: Path, shards: list[str]) -> list[str]:
    """The names, relative to the folder, of its shards and of the other files of a model. Raises CheckpointError for a
    link that leads out of the folder."""
    # a model with its own code (trust_remote_code) does not open without it
    code = ("*.py",) if "auto_map" in read_json(directory / "config.json") else ()
    paths = {path for pattern in UPLOADED + code for path in directory.glob(pattern) if path.is_file()}
    for path in paths:
        refuse_outside(path, directory)
    return sorted({path.relative_to(directory).as_posix() for path in paths} | set(shards))


def _token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise HubError("not logged in to the Hub; run `hf auth login`, or set HF_TOKEN to a token with write access")
    return token
