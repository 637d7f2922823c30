"""Push a compressed folder to the Hugging Face Hub: the only file that uploads.

Order: everything that can be refused without the network, then the repo, then the card, then the files. The
first request carries no retries, so a Hub that cannot be reached is reported at once; only the upload itself
is retried, by huggingface_hub.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from llmsqueeze.card import MARK, model_card, read_sidecar
from llmsqueeze.errors import CheckpointError, HubError, OutputError, UnsupportedError, nearest
from llmsqueeze.files import EVALUATION, INDEX, SIDECAR, read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi


# What may leave the disk beside the shards. A list of the allowed, because the folder may also hold logs,
# notes, or the shards of an earlier run.
BELONGS = (
    *("config.json", "generation_config.json", SIDECAR, EVALUATION, "README.md", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model", "*.tiktoken"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json"),
    *("*LICENSE*", "*LICENCE*", "*NOTICE*", "USE_POLICY*"),
)


def push(directory: Path, repo: str, private: bool = False) -> str:
    """Upload a compressed folder and its model card to `repo` on the Hub; returns the repo's URL.

    Writes README.md into the folder; one that is not ours is kept beside it as README.before-push.md.
    Raises UnsupportedError or CheckpointError for a folder that is not a whole one of ours, OutputError when
    the card cannot be written, and HubError when the Hub cannot be reached or refuses.
    """
    shards = check_folder(directory)
    check_repo_id(repo)
    model_card(directory, repo)  # a folder that cannot be described is refused before a repo is made
    token = _token()

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _hub_errors(api, repo):
        # without --private the namespace's own default applies, which an organisation may have set to private
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise HubError(
                f"'{url.repo_id}' exists and is public, and --private does not change a repo that exists; "
                "make it private in its settings on the Hub, or push to a new name"
            )
    write_card(directory, url.repo_id)
    with _hub_errors(api, url.repo_id):
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=directory,
            allow_patterns=[glob.escape(name) for name in files_to_upload(directory, shards)],
            commit_message="Upload a model compressed by llmsqueeze",
        )
    return str(url)


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


def write_card(directory: Path, repo: str) -> None:
    """Write README.md; one that llmsqueeze did not write is first renamed README.before-push.md."""
    readme = directory / "README.md"
    card = model_card(directory, repo)
    try:
        if readme.is_file() and MARK not in readme.read_text(encoding="utf-8", errors="replace"):
            readme.replace(directory / "README.before-push.md")
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


@contextmanager
def _hub_errors(api: HfApi, repo: str) -> Iterator[None]:
    """Turn what the Hub, the network and huggingface_hub's checks raise into a HubError."""
    # huggingface_hub changed its HTTP library between versions; this name follows it
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(_explain(api, repo, error)) from error


def _explain(api: HfApi, repo: str, error: BaseException) -> str:
    """One line on what went wrong and what to do about it."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    # the upload's threads wrap what happened in a RuntimeError
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            # a server may quote the request, and with it the token
            said = _first_line(cause.server_message).replace(str(api.token), "...")
            return _refusal(api, repo, cause.response.status_code, said)
        if isinstance(cause, OfflineModeIsEnabled):
            return "offline mode is on: nothing can be uploaded; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
        if isinstance(cause, HTTPError):
            return f"cannot reach the Hub at {api.endpoint}: {_first_line(cause)}; check the network and HF_ENDPOINT"
    return f"the upload to '{repo}' failed: {_first_line(error)}"


def _refusal(api: HfApi, repo: str, status: int, said: str) -> str:
    """What an HTTP status of the Hub means for this push; `said` is the Hub's own word on it."""
    said = f" ({said})" if said else ""
    if status == 401:
        return (
            f"the Hub does not accept your token{said}; run `hf auth login` again, "
            "or set HF_TOKEN to a valid token with write access"
        )
    if status in (403, 404):
        return f"you may not write to '{repo}' on the Hub{said}; {_where_allowed(api, repo)}"
    return f"the Hub answered {status} for '{repo}'{said}"


def _where_allowed(api: HfApi, repo: str) -> str:
    """The nearest repo that the user may write to, or what the token lacks for this one."""
    owner, _, name = repo.rpartition("/")
    try:
        user = str(api.whoami()["name"])
    except Exception:
        # only a hint on top of an error that is reported anyway
        user = ""
    if owner in ("", user):
        return "use a token with write access to it (https://huggingface.co/settings/tokens)"
    own = f"'{user}/{name}'" if user else "a repo under your own name"
    return f"push to {own}, or use a token with write access to '{owner}'"


def _first_line(text: object) -> str:
    return next((line.strip() for line in str(text or "").splitlines() if line.strip()), "")
