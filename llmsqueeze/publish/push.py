"""Push a compressed folder to the Hugging Face Hub: the only file that uploads.

Order: everything that can be refused without the network, then the repo and the card's metadata, then each file of
weights into the Hub's storage, then one commit with all files. The repo goes from what it was to the whole new model
in one step: a push that breaks off changes nothing in it, and what has reached the storage is not sent again. The first
request carries no retries, so a Hub that cannot be reached is reported at once; only the upload itself is retried, by
huggingface_hub.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from llmsqueeze.errors import CheckpointError, HubError, OutputError, UnsupportedError, nearest
from llmsqueeze.files import COMPARISON, EVALUATION, FRONTIER, INDEX, SIDECAR, SINGLE, read_json
from llmsqueeze.formats.public import human_bytes, shown
from llmsqueeze.progress import Progress
from llmsqueeze.publish.card import MARK, model_card, read_sidecar
from llmsqueeze.publish.hub_errors import hub_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

README = "README.md"
KEPT_README = "README.before-push.md"
OURS = (SIDECAR, EVALUATION, COMPARISON)  # made by us, and sent without what `shown` cuts
# What may leave the disk beside the shards. A list of the allowed, because the folder may also hold logs,
# notes, or the shards of an earlier run.
BELONGS = (
    *("config.json", "generation_config.json", README, INDEX, FRONTIER, *OURS),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json"),
    *("*LICENSE*", "*LICENCE*", "*NOTICE*", "USE_POLICY*"),
)
RESUME = "the same command goes on from there: what has arrived is not sent again"


def push(
    directory: Path,
    repo: str,
    private: bool | None = None,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Upload a compressed folder and its model card to `repo` on the Hub; says what went where.

    private: None makes a new repo private and leaves one that exists as it is. dry_run: no request, no change.
    Writes README.md into the folder; one that is not ours is kept beside it as README.before-push.md.
    Raises UnsupportedError or CheckpointError for a folder that is not a whole and sound one of ours, OutputError when
    the card cannot be written, and HubError when the Hub cannot be reached or refuses.
    """
    shards = check_folder(directory)
    check_repo_id(repo)
    model_card(directory, repo)  # a folder that cannot be described is refused before the long look at its weights
    token = None if dry_run else _token()
    checked = _sound(directory, trust_remote_code)

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    if dry_run:
        return _foreseen(directory, repo, private, shards, model_card(directory, repo, checked), api.endpoint)
    with hub_errors(api, repo):
        url = api.create_repo(repo, private=private is not False, exist_ok=True)
        is_private = _fits(api, url.repo_id, private)
    card = model_card(directory, url.repo_id, checked)
    with hub_errors(api, url.repo_id):
        _check_metadata(card)
    write_card(directory, card)
    names = files_to_upload(directory, shards)
    _upload(api, url.repo_id, directory, names, shards, progress or Progress())
    sizes = {name: _nbytes(directory / name) for name in names}
    return _summary(url.repo_id, str(url), is_private, sizes, dry_run=False)


def _sound(directory: Path, trust_remote_code: bool) -> dict[str, Any]:
    """What `llmsqueeze check` finds; raises CheckpointError for a folder that does not pass."""
    from llmsqueeze.formats.check import check

    checked = check(str(directory), trust_remote_code=trust_remote_code)
    if not checked["sound"]:
        more = len(checked["errors"]) - 1
        raise CheckpointError(
            f"'{directory}' is not sound, nothing was sent: {checked['errors'][0]}"
            + (f" (and {more} more)" if more else "")
            + f"; `llmsqueeze check {directory}` tells all"
        )
    return checked


def _fits(api: HfApi, repo: str, private: bool | None) -> bool:
    """Whether the repo is private; raises HubError where that is not what was asked for, or a file is in the way."""
    info = api.model_info(repo)
    if private is not None and private != info.private:
        is_, flag, wanted = ("private", "--public", "public") if info.private else ("public", "--private", "private")
        raise HubError(
            f"'{repo}' exists and is {is_}, and {flag} does not change a repo that exists; "
            f"make it {wanted} in its settings on the Hub, push to a new name, or leave {flag} out"
        )
    if SINGLE in (file.rfilename for file in info.siblings or []):
        raise HubError(
            f"'{repo}' holds {SINGLE}, which programs would open instead of the weights that a push brings; "
            "delete it there, or push to a new name"
        )
    return bool(info.private)


def _check_metadata(card: str) -> None:
    """Raises ValueError for a card that the Hub would refuse: before the weights are sent, not after."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(card).validate()
    except ValueError as error:
        raise ValueError(f"the Hub refuses the model card's metadata: {error}") from error


def _upload(api: HfApi, repo: str, directory: Path, names: list[str], shards: list[str], progress: Progress) -> None:
    from huggingface_hub import CommitOperationAdd

    with hub_errors(api, repo, f"the repo is as it was, and {RESUME}"):
        files = {name: CommitOperationAdd(name, _content(directory / name)) for name in names}
        # one after the other: together, all would be half there when the connection breaks
        for shard in progress.over(shards, "sending weights, by file", len(shards)):
            api.preupload_lfs_files(repo, [files[shard]], free_memory=False)
    with hub_errors(api, repo, RESUME):
        api.create_commit(repo, list(files.values()), commit_message="Upload a model compressed by llmsqueeze")


def _content(path: Path) -> Path | bytes:
    """What is sent of a file: the file, or the text of a JSON of ours that names something of the maker's disk."""
    if path.name in OURS:
        value = read_json(path)
        if shown(value) != value:
            return (json.dumps(shown(value), indent=2, ensure_ascii=False) + "\n").encode()
    return path


def _nbytes(path: Path) -> int:
    content = _content(path)
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _foreseen(
    directory: Path, repo: str, private: bool | None, shards: list[str], card: str, endpoint: str
) -> dict[str, Any]:
    """What a push would do; the card is added, because it is not written."""
    sizes = {name: _nbytes(directory / name) for name in files_to_upload(directory, shards) if name != README}
    sizes = dict(sorted((sizes | {README: len(card.encode())}).items()))
    return _summary(repo, f"{endpoint}/{repo}", private, sizes, dry_run=True) | {"card": card}


def _summary(repo: str, url: str, private: bool | None, files: dict[str, int], dry_run: bool) -> dict[str, Any]:
    nbytes = sum(files.values())
    return {"repo": repo, "url": url, "private": private, "files": files, "nbytes": nbytes, "dry_run": dry_run}


def describe(pushed: dict[str, Any], directory: Path) -> str:
    """What `push` returned, for people."""
    total = f"{len(pushed['files'])} files, {human_bytes(pushed['nbytes'])}"
    if not pushed["dry_run"]:
        return f"{pushed['url']} ({'private' if pushed['private'] else 'public'}): {total}"
    seen = {True: "private", False: "public", None: "private; one that exists stays as it is"}[pushed["private"]]
    width = max(len(name) for name in pushed["files"])
    _, front, _ = pushed["card"].split("---\n", 2)
    return "\n".join(
        [
            *(f"  {name:{width}}  {nbytes:>15,}" for name, nbytes in pushed["files"].items()),
            f"\nThe card's metadata ({directory / README} would hold the card, {pushed['files'][README]:,} bytes):\n",
            front,
            f"dry run, nothing was sent or written: {pushed['url']} ({seen}) would get {total}",
        ]
    )


def check_folder(directory: Path) -> list[str]:
    """The shard names of a whole folder of ours; raises UnsupportedError or CheckpointError for any other."""
    if not directory.is_dir():
        siblings = [path.name for path in directory.parent.glob("*/")] if directory.parent.is_dir() else []
        hint = nearest(directory.name, siblings)
        raise UnsupportedError(f"'{directory}' is not a folder; name one that `llmsqueeze quantize` wrote{hint}")
    name = directory.resolve().name
    if name.endswith(".partial"):
        raise UnsupportedError(
            f"'{directory}' is the unfinished output of `llmsqueeze quantize`; run that command again to "
            f"make it whole, then push '{name.removesuffix('.partial')}'"
        )
    told = read_sidecar(directory).get("format", "llmsqueeze")
    config = directory / "config.json"
    if not config.is_file():
        raise CheckpointError(f"'{directory}' has no config.json; run `llmsqueeze quantize` again to write it")
    quantization = read_json(config).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in ("llmsqueeze", "compressed-tensors", None) or (method or "dense") != told:
        raise UnsupportedError(
            f"'{config}' has quant_method {method!r} where {SIDECAR} says {told!r}; push handles only what llmsqueeze "
            "writes (`hf upload` uploads any other folder)"
        )
    return _shards(directory)


def _shards(directory: Path) -> list[str]:
    """The names of the weight files, all of them there; raises CheckpointError when one is not."""
    index = directory / INDEX
    if not index.is_file():
        raise CheckpointError(f"'{directory}' has no {INDEX}; run `llmsqueeze quantize` again to write it")
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"'{index}' has no weight_map; run `llmsqueeze quantize` again to write it")
    shards = sorted({str(name) for name in weights.values()})
    # an index is only text: it must not make us upload a file from elsewhere on the disk
    if outside := [name for name in shards if PurePath(name).name != name or not name.endswith(".safetensors")]:
        raise CheckpointError(f"'{index}' names '{outside[0]}'; only .safetensors files in the folder are allowed")
    if missing := [name for name in shards if not (directory / name).is_file()]:
        raise CheckpointError(
            f"'{directory}' lacks {', '.join(missing)}: {len(missing)} of the {len(shards)} files that "
            f"{INDEX} names; run `llmsqueeze quantize` again, or copy the whole folder"
        )
    return shards


def check_repo_id(repo: str) -> None:
    """Raises HubError unless `repo` is a name that the Hub allows."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        words = re.sub(r"^\w+://[^/]*/", "", repo).split("/")
        clean = [re.sub(r"[^\w.]+|\.\.+", "-", word, flags=re.ASCII).strip("-.") for word in words]
        guess = "/".join([word for word in clean if word][-2:]).removesuffix(".git")[:96]
        raise HubError(
            f"'{repo}' is not a name for a repo on the Hub; allowed is 'owner/name' of at most 96 letters, "
            "digits, '-', '_' and '.', without '--' or '..', and no '-' or '.' at either end"
            + (f"; did you mean '{guess}'?" if guess else "")
        ) from error


def write_card(directory: Path, card: str) -> None:
    """Write README.md; one that llmsqueeze did not write is first renamed README.before-push.md. Raises OutputError."""
    readme = directory / README
    try:
        if readme.is_file() and MARK not in readme.read_text(encoding="utf-8", errors="replace"):
            readme.replace(directory / KEPT_README)
        readme.write_text(card, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"the model card '{readme}' cannot be written: {error.strerror}") from error


def files_to_upload(directory: Path, shards: list[str]) -> list[str]:
    """The names, relative to the folder, of its shards and of the other files that belong to a model."""
    # a model with code of its own (trust_remote_code) does not open without it
    code = ("*.py",) if "auto_map" in read_json(directory / "config.json") else ()
    found = {path for pattern in BELONGS + code for path in directory.glob(pattern) if path.is_file()}
    return sorted({path.relative_to(directory).as_posix() for path in found} | set(shards))


def _token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise HubError("not logged in to the Hub; run `hf auth login`, or set HF_TOKEN to a token with write access")
    return token
