"""What `--calibration` and `--text` name: files, folders, the Hub, the demo, and several with shares."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmsqueeze.errors import CalibrationError
from llmsqueeze.text.document import Chat, Document, Text
from llmsqueeze.text.source import (
    calibration_texts,
    check_calibration,
    evaluation_text,
    read_text,
    shares,
    text_names,
    without_folders,
)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


ROWS = [{"text": "one", "id": 1}, {"text": "two", "id": 2}]
TABLE = pa.table({"text": ["one", "two"], "id": [1, 2]})


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    return sink.getvalue()


def arrow() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


LONG = "Once, there was a fox, as the old and wise say"
CHAT = Chat(({"role": "user", "content": "hi"},))
LINES = "\n".join(map(json.dumps, ROWS))
FILES = {
    "a.jsonl": LINES.encode(),
    "a.ndjson": b"\xef\xbb\xbf" + LINES.encode(),
    "a.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "strings.json": b'["one", "two"]',
    "a.csv": b"id,text\n1,one\n2,two\n",
    "semicolons.csv": b"\xef\xbb\xbfid;text\n1;one\n2;two\n",
    "a.tsv": b"id\ttext\n1\tone\n2\ttwo\n",
    "a.parquet": parquet(),
    "a.arrow": arrow(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.csv.gz": gzip.compress(b"id,text\n1,one\n2,two\n"),
    "a.tsv.gz": gzip.compress(b"id\ttext\n1\tone\n2\ttwo\n"),
    "a.json.xz": lzma.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_rows_in_files(name: str, tmp_path: Path) -> None:
    text = read_text(write(tmp_path / name, FILES[name]), "train")
    assert text == Text(name, ("one", "two"))
    assert text.content == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", b"one\ntwo"), ("a.txt.gz", gzip.compress(b"one\ntwo", mtime=0))]
)
def test_plain_text(name: str, content: bytes, tmp_path: Path) -> None:
    assert read_text(write(tmp_path / name, content), "train") == Text(name, ("one\ntwo",))


def test_zstd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its package the message names it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match="pip install zstandard"):
        read_text(write(tmp_path / "a.txt.zst", b""), "train")
    monkeypatch.undo()
    zstandard = pytest.importorskip("zstandard")
    for name, content in {"a.txt.zst": b"one", "a.jsonl.zst": LINES.encode()}.items():
        path = write(tmp_path / name, zstandard.compress(content))
        assert read_text(path, "train").content.startswith("one")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (LINES, "JSON"),
        (json.dumps(ROWS, indent=1), "JSON"),
        ("id,text\n1,one\n2,two\n", "a table"),
        ("id\ttext\n1\tone\n2\ttwo\n", "a table"),
    ],
)
def test_rows_under_the_name_of_plain_text_are_noticed(content: str, kind: str, tmp_path: Path) -> None:
    text = read_text(write(tmp_path / "a.txt", content), "train")
    assert text.documents == ("one", "two")
    assert text.notes == (f"a.txt looks like {kind} and is read as such",)


@pytest.mark.parametrize(
    "content",
    ["{ a brace\n} another", "[1] See the text, as it says.\nMore of it.", "Hello, text\nand more", '[\n"no end'],
)
def test_prose_is_not_taken_for_rows(content: str, tmp_path: Path) -> None:
    assert read_text(write(tmp_path / "a.txt", content), "train") == Text("a.txt", (content,))


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    """Files of rows end when there are enough characters."""
    many = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": f"{i:04}" * 25}) for i in range(1000)))
    assert len(read_text(many, "train", enough=1000).documents) == 10
    assert len(read_text(many, "train").documents) == 1000


def test_what_a_table_calls_missing_is_a_word(tmp_path: Path) -> None:
    text = read_text(write(tmp_path / "a.csv", "text,id\nNA,1\nNone,2\n,3\n"), "train")
    assert text.documents == ("NA", "None")
    assert text.notes == ("of 3 rows of a.csv, 1 are empty and left out",)


@pytest.mark.parametrize(
    ("name", "content", "documents", "said"),
    [
        ("a.csv", "1,One day a fox ran.\n2,It slept.\n", ("One day a fox ran.", "It slept."), "column 1 to column 2"),
        (
            "a.csv",
            '"Once, there was a fox, as the old and wise say"\nIt slept\n',
            (LONG, "It slept"),
            "called column 1",
        ),
        ("a.tsv", "1\tone\n2\ttwo\n", ("one", "two"), "has no line with the names of its columns"),
        ("a.csv", "a story\none\n", ("one",), "its first line, 'a story', is taken for the names of its columns"),
        ("a.csv", ",story told\n0,one\n", ("one",), "its first line, ', story told', is taken"),
        ("a.csv", "1st. of all,text\n0,one\n", ("one",), ""),
    ],
)
def test_a_table_without_names_loses_no_row(
    name: str, content: str, documents: tuple[Document, ...], said: str, tmp_path: Path
) -> None:
    text = read_text(write(tmp_path / name, content), "train")
    assert text.documents == documents
    (note,) = text.notes or [""]
    assert said in note
    assert bool(said) is bool(note)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{', "a.jsonl line 2 is not JSON"),
        ("", "a.jsonl is empty"),
        ('{"text": ""}\n{"text": null}', "a.jsonl has no text in text"),
        ('{"n": 1}', "name it with --text-field \\(it has: n"),
        ('{"title": "a", "summary": "b"}', "name it with --text-field \\(it has: title, summary"),
    ],
)
def test_rows_without_text(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_text(write(tmp_path / "a.jsonl", content), "train")


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.json", '{"version": 1, "data": [{"text": "one"}, {"text": "two"}]}', ("one", "two")),
        ("a.json", '{"text": "one"}\n{"text": "two"}', ("one", "two")),
        ("a.json", '{"text": "one"}', ("one",)),
        ("a.json", '{"about": "rows", "data": [{"text": "one"}, {"text": "two"}]}', ("one", "two")),
        ("a.json", '{"text": "one", "sources": [{"text": "two"}]}', ("one",)),
        ("a.json", '{"id": "a", "messages": [{"role": "user", "content": "hi"}]}', (CHAT,)),
        ("a.jsonl", '[{"role": "user", "content": "hi"}]\n' * 2, (CHAT, CHAT)),
        ("a.json", '[[{"role": "user", "content": "hi"}]]', (CHAT,)),
        ("a.jsonl", '"one"\n"two"', ("one", "two")),
        ("a.json", '{"text": ["one", "two"]}', ("one", "two")),
        ("a.json", '{"id": [1, 2], "text": ["one", null]}', ("one",)),
        ("a.json", '{"id": {"0": 1, "1": 2}, "text": {"0": "one", "1": "two"}}', ("one", "two")),
        ("a.json", '{"messages": [[{"role": "user", "content": "hi"}], null]}', (CHAT,)),
        ("a.jsonl", '{"text": "one", "x": 1}\n{"text": "two", "x": {"y": "z"}}', ("one", "two")),
    ],
)
def test_forms_of_json(name: str, content: str, documents: tuple[Document, ...], tmp_path: Path) -> None:
    assert read_text(write(tmp_path / name, content), "train").documents == documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "3", "holds no rows: it is neither a list nor an object"),
        ("a.json", "[1, 2", "a.json is not JSON"),
        ("a.jsonl", "3\n4", "has no text in text|--text-field"),
        ("a.json", '{"text": ["one", "two"], "id": [1]}', "has no field that is known"),
        ("a.jsonl.gz", b"no gzip", "cannot read"),
        ("a.jsonl", b'{"text": "\xff"}', "is not text: byte 10 is not UTF-8"),
        ("a.parquet", b"no parquet", "a.parquet cannot be read"),
    ],
)
def test_files_without_rows(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_text(write(tmp_path / name, content), "train")


@pytest.fixture
def splits() -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": ["one", "two"]}),
            "test": datasets.Dataset.from_dict({"text": ["three"]}),
        }
    )


def test_folders_that_datasets_saved(splits: datasets.DatasetDict, tmp_path: Path) -> None:
    splits.save_to_disk(tmp_path / "all")
    splits["test"].save_to_disk(tmp_path / "one")
    assert read_text(str(tmp_path / "all"), "train") == Text("all", ("one", "two"))
    assert read_text(str(tmp_path / "all"), "test") == Text("all", ("three",))
    assert read_text(f"{tmp_path / 'all'}::test", "train") == Text("all test", ("three",))
    assert read_text(str(tmp_path / "one"), "train") == Text("one", ("three",))
    with pytest.raises(
        CalibrationError, match=r"has no split 'tests'; did you mean 'test'\? \(it has: train, test; .*folder::split"
    ):
        read_text(f"{tmp_path / 'all'}::tests", "train")


def test_folders_of_files(tmp_path: Path) -> None:
    """As the Hub has them; a split is told by the name of its file."""
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", LINES)
    write(folder / "test.jsonl", '{"text": "three"}')
    assert read_text(str(folder), "train").documents == ("one", "two")
    assert read_text(str(folder), "test").documents == ("three",)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="empty is a folder that datasets cannot read: "):
        read_text(str(tmp_path / "empty"), "train")


def test_files_in_folders_are_read_as_files_are(tmp_path: Path) -> None:
    """Each by its own reader: missing values are words, lists are unwrapped, rows differ, and damage is named."""
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "a.csv", "text,id\nNA,1\n,2\n")
    write(folder / "b.csv.gz", gzip.compress(b"1,One day a fox ran.\n"))
    write(folder / "c.txt", "plain\n\ntext")
    text = read_text(str(folder), "train")
    assert text.documents == ("NA",)
    assert [note.partition(":")[0] for note in text.notes] == [
        "b.csv.gz has no line with the names of its columns",
        "of the folder set c.txt is not read",
        "of 3 rows of set, 2 are empty and left out",
    ]
    for one in folder.iterdir():
        one.unlink()
    write(folder / "a.json", '{"version": 1, "data": [{"text": "one", "x": 1}, {"text": "two", "x": {"y": 2}}]}')
    assert read_text(str(folder), "train").documents == ("one", "two")
    write(folder / "b.json", "[1, 2")
    with pytest.raises(CalibrationError, match=r"b.json is not JSON"):
        read_text(str(folder), "train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "the name of the text is empty"),
        (",", "the name of the text is empty"),
        ("a.txt:70%,b.txt:30%", "a.txt:70%: the file a.txt has neither configurations nor splits; shares are numbers"),
        ("a.txt:0.7,bb.txt:0.3", r"there is no text file bb.txt; did you mean 'b.txt'\?"),
        ("chats.txt", "there is no text file chats.txt$"),
    ],
)
def test_names_of_no_text(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty name is not the folder in which the user is."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.txt", "two")
    with pytest.raises(CalibrationError, match=message):
        calibration_texts(source, "any")


def test_several_texts_with_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"a.txt": "one", "b.txt": "two", "odd,name:0.5": "three"}.items():
        write(tmp_path / name, content)
    assert shares("a.txt:0.7,b.txt:0.3") == [("a.txt", 0.7), ("b.txt", 0.3)]
    assert shares("a.txt:7, owner/set:config:train:3") == [("a.txt", 7.0), ("owner/set:config:train", 3.0)]
    assert shares("a.txt,b.txt") == [("a.txt", 1.0), ("b.txt", 1.0)]
    assert shares("odd,name:0.5") == [("odd,name:0.5", 1.0)]
    assert shares("owner/set:2024") == [("owner/set:2024", 1.0)], "alone, it is a configuration"
    for wrong in ("a.txt:0.7,b.txt", "a.txt:0,b.txt:1"):
        with pytest.raises(CalibrationError, match="give every text a share above 0"):
            shares(wrong)
    texts = calibration_texts("a.txt:3,b.txt:1", "any")
    assert texts == [Text("a.txt", ("one",), 3.0), Text("b.txt", ("two",), 1.0)]
    assert shares("a.txt:1,odd,name:0.5:3") == [("a.txt", 1.0), ("odd,name:0.5", 3.0)]
    assert shares("odd,name:0.5,a.txt") == [("odd,name:0.5", 1.0), ("a.txt", 1.0)]
    with pytest.raises(CalibrationError, match="self cannot stand beside"):
        calibration_texts("self,a.txt", "any")


def test_names_for_the_record_and_the_card(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one")
    assert without_folders(path) == "a.txt"
    assert without_folders(f"{path}:3,owner/set:1") == "a.txt:3,owner/set:1"
    assert text_names("a.txt:3,owner/set:config:1") == ["a.txt", "owner/set:config"]
    assert text_names("owner/set:2024") == ["owner/set:2024"]
    assert text_names("odd,name.txt:0.5,a.txt:1") == ["odd,name.txt", "a.txt"]


def test_a_field_is_for_texts_that_have_fields(tmp_path: Path) -> None:
    plain, rows = write(tmp_path / "a.txt", "one"), write(tmp_path / "a.jsonl", LINES)
    with pytest.raises(CalibrationError, match=r"--text-field text: a.txt is plain text, without fields"):
        calibration_texts(plain, "any", "text")
    both = calibration_texts(f"{plain},{rows}", "any", "text")
    assert [text.documents for text in both] == [("one",), ("one", "two")]


@pytest.mark.parametrize("source", ["nothing.txt", "./nothing", "a.txt:1,nothing.jsonl:1"])
def test_a_missing_file_is_seen_before_it_is_read(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "one")
    with pytest.raises(CalibrationError, match=r"there is no text file .*nothing"):
        check_calibration(source)
    for there in ("a.txt", "self", "demo", "owner/set", None):
        check_calibration(there)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A Hub with one data set, which datasets itself builds from local files; and what is asked of it."""
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("one", " ", "two")))
    asked, load_dataset = list[tuple[Any, ...]](), datasets.load_dataset

    def load(name: str, config: str | None, split: str, **options: Any) -> Any:
        asked.append((name, config, split, options))
        cache = str(tmp_path / "cache")
        return load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=cache, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("llmsqueeze.text.data_sets.hub_answers", lambda name: True)
    return asked


def test_a_data_set_from_the_hub(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """`name:config:split` as datasets gets it; one that is not small is read as far as needed."""
    text = read_text("owner/set:raw:validation", "train")
    assert text.source == "owner/set raw validation"
    assert text.documents == ("one", "two")
    monkeypatch.setattr("llmsqueeze.text.data_sets.small", lambda name, config: name == "owner/small")
    assert read_text("owner/set", "test", enough=1).documents == ("one",)
    assert read_text("owner/small", "test", enough=1).source == "owner/small test"
    assert hub == [
        ("owner/set", "raw", "validation", {}),
        ("owner/set", None, "test", {"streaming": True}),
        ("owner/small", None, "test", {}),
    ]


def test_without_a_source_the_papers_choice_or_the_demos_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "llmsqueeze.text.source.read_hub",
        lambda name, config, split, *_: Text(f"{name} {config} {split}", ("hub text",)),
    )
    assert calibration_texts(None, "owner/model")[0].source == "Salesforce/wikitext wikitext-2-raw-v1 train"
    assert evaluation_text(None, "owner/model").source == "Salesforce/wikitext wikitext-2-raw-v1 test"
    assert calibration_texts(None, "demo")[0].content != evaluation_text(None, "demo").content
    assert calibration_texts("demo", "owner/model") == calibration_texts(None, "demo")
