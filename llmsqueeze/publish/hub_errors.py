"""Errors of the Hub, the network and huggingface_hub as one line with a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmsqueeze.errors import HubError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# hf_xet, which uploads large files, raises built-in errors; the HTTP status is in their text
XET_STATUS = re.compile(r"\((4\d\d) [A-Z]")


@contextmanager
def hub_errors(api: HfApi, repo: str, state: str = "") -> Iterator[None]:
    """Turns errors of the Hub, the network and huggingface_hub's checks into a HubError; its line ends with `state`, as
    does that of an interruption."""
    # huggingface_hub changed its HTTP library between versions; this name follows it
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except KeyboardInterrupt as error:
        if state:
            error.add_note(state)
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(_explain(api, repo, error) + (f"; {state}" if state else "")) from error


def _explain(api: HfApi, repo: str, error: BaseException) -> str:
    """One line: the cause and the remedy."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    # the threads of the upload wrap the cause in a RuntimeError
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            # a server may quote the request, and with it the token
            answer = (cause.server_message or "").strip().partition("\n")[0].replace(str(api.token), "...")
            return _refusal(api, repo, cause.response.status_code, answer)
        if isinstance(cause, OfflineModeIsEnabled):
            return "offline mode is on: nothing can be uploaded; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
        if isinstance(cause, HTTPError):
            return f"cannot reach the Hub at {api.endpoint}: {first_line(cause)}; check the network and HF_ENDPOINT"
    line = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", first_line(error)).replace(str(api.token), "...")
    status = XET_STATUS.search(line)
    return _refusal(api, repo, int(status[1]), line) if status else f"the upload to '{repo}' failed: {line}"


def _refusal(api: HfApi, repo: str, status: int, answer: str) -> str:
    """The meaning of an HTTP status of the Hub for this push. `answer`: the message of the Hub."""
    answer = f" ({answer})" if answer else ""
    if status == 401:
        return (
            f"the Hub does not accept your token{answer}; run `hf auth login` again, "
            "or set HF_TOKEN to a valid token with write access"
        )
    if status == 403:
        return f"you may not write to '{repo}' on the Hub{answer}; {_where_allowed(api, repo)}"
    if status == 404:
        return f"the Hub has no '{repo}' that you may write to{answer}; {_where_allowed(api, repo)}"
    return f"the Hub answered {status} for '{repo}'{answer}"


def _where_allowed(api: HfApi, repo: str) -> str:
    """The nearest repository that the user may write to, or the token that is necessary for this one."""
    owner, _, name = repo.rpartition("/")
    try:
        user = str(api.whoami()["name"])
    except Exception:
        # this is only a hint for an error that is reported in any case
        user = ""
    if owner in ("", user):
        return "use a token with write access to it (https://huggingface.co/settings/tokens)"
    own = f"'{user}/{name}'" if user else "a repository of your own"
    return f"push to {own}, or use a token with write access to '{owner}'"
