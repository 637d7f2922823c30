"""Chats: conversations as data sets hold them -> messages -> the text that the model sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmsqueeze.errors import CalibrationError, reason
from llmsqueeze.text.document import Chat, Document, Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "ai"),
    "tool": ("tool", "function", "observation", "tool_response", "ipython"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")


class UnreadableError(ValueError):
    """A row is neither text nor a chat; the message says why."""


def conversation(value: Any) -> list[dict[str, Any]] | None:
    """The messages as they are stored, a list of mappings or its JSON; None if the value is something else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return None
    return value if all(_first(message, ROLE_KEYS) is not None for message in value) else None


def messages(stored: Sequence[dict[str, Any]]) -> tuple[Message, ...]:
    """The messages with the roles and keys of chat templates. Raises UnreadableError for a role that none knows."""
    return tuple(_message(message) for message in stored)


def exchange(prompt: str, answer: str) -> tuple[Message, ...]:
    """A question and its answer."""
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools that a row names for its chat, a list of mappings or its JSON; none if it is something else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return ()
    return tuple(value) if isinstance(value, list) and all(isinstance(one, dict) for one in value) else ()


def _message(stored: dict[str, Any]) -> Message:
    named = str(_first(stored, ROLE_KEYS))
    if (role := ROLE_OF.get(named.lower())) is None:
        raise UnreadableError(f"a message has the role {named!r}, which is none of {', '.join(ROLES)}")
    content = _first(stored, CONTENT_KEYS)
    if isinstance(content, list):  # parts, of which only text can be read here
        texts = (part.get("text") for part in content if isinstance(part, dict))
        content = "".join(text for text in texts if isinstance(text, str))
    message: Message = {"role": role, "content": content if isinstance(content, str) else ""}
    if isinstance(stored.get("tool_calls"), list) and stored["tool_calls"]:
        message["tool_calls"] = stored["tool_calls"]
    return message


def _first(message: dict[str, Any], keys: Sequence[str]) -> Any:
    """The first value that is there."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def rendered(text: Text, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The text with its chats as the model sees them, by the tokenizer's chat template; as plain text if it has none.

    The beginning-of-text token that a template writes is left out: rows have their own. It stays if it begins other
    turns too. Chats that the template refuses are left out, and a note counts them. Raises CalibrationError if it
    refuses all.
    """
    if all(isinstance(document, str) for document in text.documents):
        return text
    notes = list(text.notes)
    if not tokenizer.chat_template:
        notes.append(f"the model has no chat template: the messages of {text.source} are read as plain text")
    documents: list[Document] = []
    why = ""
    for document in text.documents:
        try:
            documents.append(document if isinstance(document, str) else seen(document, tokenizer))
        except Exception as error:  # templates raise errors of their own, and others by mistake
            why = reason(error)
    if not documents:
        raise CalibrationError(f"the model's chat template takes none of the chats of {text.source}: {why}")
    if refused := len(text.documents) - len(documents):
        notes.append(f"{refused} chats of {text.source} are left out: the model's chat template refuses them ({why})")
    return replace(text, documents=tuple(documents), notes=tuple(notes))


def seen(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat as the model sees it. Raises what the template raises."""
    said = chat.messages
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in said if message["content"])
    how: dict[str, Any] = {"tools": list(chat.tools) or None, "tokenize": False}
    try:
        text = tokenizer.apply_chat_template(list(said), **how)
    except Exception:
        if said[0]["role"] != "system" or len(said) < 2:
            raise
        text = tokenizer.apply_chat_template(_without_system(said), **how)  # many templates take no such role
    assert isinstance(text, str), "without tokenize a template gives text"
    begins = tokenizer.bos_token
    return text.removeprefix(begins) if isinstance(begins, str) and text.count(begins) == 1 else text


def _without_system(chat: tuple[Message, ...]) -> list[Message]:
    """The chat with the system's message at the beginning of the next one."""
    system, second, *others = chat
    return [second | {"content": f"{system['content']}\n\n{second['content']}"}, *others]
