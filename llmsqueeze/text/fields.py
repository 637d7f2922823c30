"""Which fields of a data set's rows are the text, and the documents that they make.

If nobody names a field: a conversation, a question with its answer, a text, or the only field of strings, in this
order. The names are those of data sets that many people use.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmsqueeze.errors import CalibrationError, nearest
from llmsqueeze.text.chat import UnreadableError, conversation, exchange, messages, tools_of
from llmsqueeze.text.document import Chat, Document, Message, Text, length

CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
PAIRS = (
    *(("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response")),
    *(("question", "answer"), ("question", "response"), ("query", "response"), ("problem", "solution")),
    *(("prompt", "chosen"), ("question", "chosen")),
)
WHOLE = "chosen"  # of pairs of answers: the chat from its beginning, unless the prompt is a chat too
MORE = "input"  # of an instruction
SYSTEM = ("system", "system_prompt")
TOOLS = "tools"
TEXTS = ("text", "content", "document", "article", "body", "passage", "story", "markdown", "raw_content", "code")
LOOKED_AT = 100  # rows

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """How rows are read. names: of the fields; read: row -> its document, None if it is empty, or UnreadableError."""

    names: tuple[str, ...]
    read: Callable[[Row], Document | None]


def text_of(rows: Iterable[Row], source: str, field: str | None = None, enough: int | None = None) -> Text:
    """The documents of rows, until `enough` characters are there. field: the one that has them, if the user says so.

    Raises CalibrationError if no field has text.
    """
    ahead = iter(rows)
    first = list(itertools.islice(ahead, LOOKED_AT))
    if not first:
        raise CalibrationError(f"{source} is empty")
    reading = reading_of(first, source, field)
    documents, empty, strange, count = _documents(itertools.chain(first, ahead), reading, enough)
    if not documents:
        why = f": {strange[-1]}" if strange else ""
        raise CalibrationError(f"{source} has no text in {' and '.join(reading.names)}{why}")
    notes = [f"of {count} rows of {source}, {empty} are empty and left out"] if empty else []
    if strange:
        notes.append(f"of {count} rows of {source}, {len(strange)} are left out: {strange[-1]}")
    if _lines(documents):
        documents = ["".join(document for document in documents if isinstance(document, str))]
    return Text(source, tuple(documents), notes=tuple(notes))


def _documents(rows: Iterable[Row], reading: Reading, enough: int | None) -> tuple[list[Document], int, list[str], int]:
    """The documents, how many rows are empty, why others have none, and how many rows were read."""
    documents: list[Document] = []
    strange: list[str] = []
    empty = count = characters = 0
    for row in rows:
        count += 1
        try:
            document = reading.read(row)
        except UnreadableError as error:
            strange.append(str(error))
            continue
        if document is None:
            empty += 1
            continue
        documents.append(document)
        characters += length(document) + 2  # and what stands between two
        if enough is not None and characters >= enough:
            break
    return documents, empty, strange, count


def _lines(documents: list[Document]) -> bool:
    """Whether they are the lines of one text, as in WikiText."""
    return all(isinstance(one, str) and one.find("\n") == len(one) - 1 for one in documents)


def reading_of(rows: list[Row], source: str, field: str | None) -> Reading:
    """How to read rows like these. Raises CalibrationError if no field, or none of the named name, has text."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    has_chats = {name for name in columns if any(conversation(row.get(name)) for row in rows)}
    has_strings = {name for name in columns if any(isinstance(row.get(name), str) for row in rows)}
    if field is not None:
        if field not in columns:
            hint = f"{nearest(field, columns)} (it has: {', '.join(columns)})"
            raise CalibrationError(f"{source} has no field {field!r} (--text-field){hint}")
        return _chat(field) if field in has_chats else _plain(field)
    if name := next((name for name in CHATS if name in has_chats), None):
        return _chat(name)
    for pair in PAIRS:
        if any({*pair} <= kind for kind in (has_strings, has_chats)):
            return _pair(*pair)
    if WHOLE in has_chats:
        return _chat(WHOLE)
    if name := next((name for name in TEXTS if name in has_strings), None):
        return _plain(name)
    if len(has_strings) == 1:
        return _plain(has_strings.pop())
    raise CalibrationError(
        f"{source} has no field that is known to be the text; name it with --text-field (it has: {', '.join(columns)})"
    )


def _plain(name: str) -> Reading:
    def read(row: Row) -> Document | None:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise UnreadableError(f"{name} is not text but {type(value).__name__}")
        return value if value and value.strip() else None

    return Reading((name,), read)


def _chat(name: str) -> Reading:
    def read(row: Row) -> Document | None:
        value = row.get(name)
        if not value:
            return None
        if (stored := conversation(value)) is None:
            raise UnreadableError(f"{name} is no list of messages with role and content")
        return _not_empty((*_system(row), *messages(stored)), row)

    return Reading((name,), read)


def _pair(prompt: str, answer: str) -> Reading:
    def read(row: Row) -> Document | None:
        asked, answered = row.get(prompt), row.get(answer)
        if not asked or not answered:
            return None
        said = [conversation(asked), conversation(answered)]
        if said[0] is not None and said[1] is not None:
            return _not_empty(messages([*said[0], *said[1]]), row)
        if not isinstance(asked, str) or not isinstance(answered, str):
            raise UnreadableError(f"{prompt} and {answer} are not both text")
        more = row.get(MORE)
        if prompt == "instruction" and isinstance(more, str) and more.strip():
            asked = f"{asked}\n\n{more}"
        return _not_empty((*_system(row), *exchange(asked, answered)), row)

    return Reading((prompt, answer), read)


def _system(row: Row) -> Iterator[dict[str, Any]]:
    """The system's message, if the row has one."""
    for name in SYSTEM:
        if isinstance(row.get(name), str) and row[name].strip():
            yield {"role": "system", "content": row[name]}
            return


def _not_empty(chat: tuple[Message, ...], row: Row) -> Document | None:
    """The chat with the tools of its row; None if nothing is said."""
    return Chat(chat, tools_of(row.get(TOOLS))) if any(message["content"].strip() for message in chat) else None
