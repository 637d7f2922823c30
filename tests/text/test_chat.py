"""Chats: found in rows, their roles mapped, rendered by the chat template of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from llmsqueeze.errors import CalibrationError
from llmsqueeze.text.chat import rendered
from llmsqueeze.text.document import Chat, Message, Text
from llmsqueeze.text.fields import text_of
from llmsqueeze.text.rows import beginnings, windows
from llmsqueeze.text.tokens import load_tokenizer

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be kind"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
PLAIN = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.fixture
def tokenizer(demo_dir: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(demo_dir)
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ANSWER]}, (USER, ANSWER)),
        ({"messages": [USER, ANSWER], "text": "rendered for another model"}, (USER, ANSWER)),
        ({"messages": json.dumps([USER, ANSWER])}, (USER, ANSWER)),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, (USER, ANSWER)),
        ({"messages": [USER, ANSWER], "system": "be kind"}, (SYSTEM, USER, ANSWER)),
        ({"messages": [{"role": "User", "content": [{"type": "text", "text": "hi"}]}, ANSWER]}, (USER, ANSWER)),
        ({"prompt": "hi", "response": "hello"}, (USER, ANSWER)),
        ({"prompt": [USER], "completion": [ANSWER]}, (USER, ANSWER)),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [USER]}, (USER, ANSWER)),
        ({"prompt": "hi", "chosen": [USER, ANSWER], "rejected": [USER]}, (USER, ANSWER)),
        ({"prompt": "hi", "chosen": "hello", "rejected": "go"}, (USER, ANSWER)),
        ({"instruction": "hi", "input": "", "output": "hello", "text": "as alpaca has it"}, (USER, ANSWER)),
        (
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            ({"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}),
        ),
        ({"question": "hi", "answer": "hello", "system_prompt": "be kind"}, (SYSTEM, USER, ANSWER)),
        ({"title": "a", "text": "prose"}, "prose"),
        ({"id": 3, "lyrics": "the only field of strings"}, "the only field of strings"),
    ],
)
def test_chats_and_texts_in_rows(row: dict[str, Any], expected: tuple[Message, ...] | str) -> None:
    (document,) = text_of([row], "t").documents
    assert (document.messages if isinstance(document, Chat) else document) == expected


def test_a_named_field_is_taken() -> None:
    row = {"text": "prose", "lyrics": "la", "talk": [USER]}
    assert text_of([row], "t", "lyrics").documents == ("la",)
    assert text_of([row], "t", "talk").documents == (Chat((USER,)),)
    with pytest.raises(CalibrationError, match=r"t has no field 'lyric' \(--text-field\); did you mean 'lyrics'"):
        text_of([row], "t", "lyric")


def test_rows_that_are_empty_or_strange_are_counted() -> None:
    strange = {"messages": [{"role": "narrator", "content": "once"}]}
    rows = [
        {"messages": [USER]},
        {"messages": None},
        {"messages": []},
        {"messages": [{**USER, "content": " "}]},
        strange,
    ]
    text = text_of(rows, "t")
    assert text.documents == (Chat((USER,)),)
    assert text.notes == (
        "of 5 rows of t, 3 are empty and left out",
        "of 5 rows of t, 1 are left out: a message has the role 'narrator', which is none of system, user, assistant, "
        "tool",
    )
    with pytest.raises(CalibrationError, match="t has no text in messages: a message has the role 'narrator'"):
        text_of([strange], "t")


def test_lines_of_one_text_are_one_document() -> None:
    assert text_of([{"text": "= A =\n"}, {"text": ""}, {"text": "one\n"}], "t").documents == ("= A =\none\n",)
    assert text_of([{"text": "a\nb\n"}, {"text": "c\nd\n"}], "t").documents == ("a\nb\n", "c\nd\n")


def test_a_chat_is_what_the_model_sees(tokenizer: PreTrainedTokenizerBase) -> None:
    """Without the template's BOS: every row of tokens begins with one."""
    assert tokenizer.bos_token
    text = rendered(Text("t", (Chat((SYSTEM, USER, ANSWER)), "prose")), tokenizer)
    assert text == Text("t", ("<system>be kind<user>hi<assistant>hello", "prose"))


def test_a_token_that_begins_every_turn_stays(tokenizer: PreTrainedTokenizerBase) -> None:
    """ChatML where `<|im_start|>` is the BOS token too: a chat amid a row begins with it, a row has it once."""
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.role }} {{ m.content }}{% endfor %}"
    bos = tokenizer.bos_token
    text = rendered(Text("t", (Chat((USER, ANSWER)),) * 2), tokenizer)
    assert text.documents == (f"{bos}user hi{bos}assistant hello",) * 2
    whole = tokenizer(text.content, add_special_tokens=False)["input_ids"]
    (row,) = windows(text, tokenizer, len(whole))
    assert row[0].tolist() == whole
    assert [row[0].tolist() for row in beginnings(text, tokenizer, 99)] == [
        tokenizer(document, add_special_tokens=False)["input_ids"] for document in text.documents
    ]


def test_a_template_that_takes_no_system(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = STRICT
    text = rendered(Text("t", tuple(map(Chat, ((SYSTEM, USER), (SYSTEM,), (USER,))))), tokenizer)
    assert text.documents == ("<user>be kind\n\nhi", "<user>hi")
    assert text.notes == ("1 chats of t are left out: the model's chat template refuses them (no system)",)
    with pytest.raises(CalibrationError, match="takes none of the chats of t: no system"):
        rendered(Text("t", (Chat((SYSTEM,)),)), tokenizer)


def test_a_model_without_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    text = rendered(Text("t", (Chat((USER, ANSWER)),)), tokenizer)
    assert text.documents == ("hi\n\nhello",)
    assert text.notes == ("the model has no chat template: the messages of t are read as plain text",)


@pytest.mark.parametrize("stored", [[TOOL], json.dumps([TOOL])])
def test_the_tools_of_a_row_reach_the_template(stored: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}" + STRICT
    text = text_of([{"messages": [SYSTEM, USER, ANSWER], "tools": stored}, {"messages": [USER], "tools": "none"}], "t")
    assert [document.tools for document in text.documents if isinstance(document, Chat)] == [(TOOL,), ()]
    assert rendered(text, tokenizer).documents == ("[look]<user>be kind\n\nhi<assistant>hello", "<user>hi")
