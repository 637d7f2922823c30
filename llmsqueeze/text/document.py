"""A text: documents, each a string or a chat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]  # role and content, as chat templates take them


@dataclass(frozen=True)
class Chat:
    """Messages, and the tools that the assistant may call, as chat templates take them."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


Document = str | Chat


@dataclass(frozen=True)
class Text:
    """Documents and their name in summaries and cards.

    share: of the rows, beside other texts, in any unit. notes: what a user should know of how it was read, such as the
    rows that are left out. plain: whether it has no rows, and so no fields.
    """

    source: str
    documents: tuple[Document, ...]
    share: float = 1.0
    notes: tuple[str, ...] = ()
    plain: bool = field(default=False, compare=False)

    @property
    def content(self) -> str:
        """All documents, with an empty line between them. Only of texts without chats (`chat.rendered`)."""
        return "\n\n".join(document for document in self.documents if isinstance(document, str))


def length(document: Document) -> int:
    """Characters of a document."""
    if isinstance(document, str):
        return len(document)
    return sum(len(message["content"]) for message in document.messages)
