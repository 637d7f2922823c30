"""Windows of a text against slow twins: with a stride, and as the papers cut WikiText-2."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import command, refused
from transformers import AutoModelForCausalLM

from llmsqueeze.errors import CalibrationError, HubError, RecipeError
from llmsqueeze.evaluation.evaluate import evaluate
from llmsqueeze.evaluation.losses.windows import hub_rows, papers_text, strided_rows
from llmsqueeze.text.document import Text
from llmsqueeze.text.source import evaluation_text
from llmsqueeze.text.tokens import load_tokenizer

LINES = " \n = Anna = \n \n Anna has a ball . \n She is at home . \n \n"


@pytest.fixture(scope="module")
def folder(demo_of: Callable[[int], Path]) -> Path:
    return demo_of(1)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def loss(model: Any, context: list[int], token: int) -> float:
    """Of one token after those before it, by the model's own logits."""
    with torch.no_grad():
        return -float(model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[token])


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("stride", [5, 12, 31])
def test_with_a_stride_every_token_counts_once(model: Any, folder: Path, stride: int, bos: bool) -> None:
    """Token by token: each is scored in the first window that holds it, after all that this window has before it."""
    words, length = evaluation_text("demo", "demo").content[:300], 32
    tokenizer = load_tokenizer(folder)
    if not bos:
        tokenizer.bos_token = None
    start = [tokenizer.bos_token_id] if bos else []
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    held = length - len(start)
    twin = []
    for at in range(0 if bos else 1, len(ids)):
        first = next(k * stride for k in range(len(ids)) if k * stride + held > at)
        twin.append(loss(model, start + ids[first:at], ids[at]))
    rows, counted = strided_rows(Text("t", (words,)), tokenizer, length, stride)
    assert max(row.shape[1] for row in rows) == length
    assert counted[1:-1] == [stride] * (len(rows) - 2)
    assert sum(counted) == len(twin)
    own = [
        loss(model, row[0, :at].tolist(), int(row[0, at]))
        for row, count in zip(rows, counted, strict=True)
        for at in range(row.shape[1] - count, row.shape[1])
    ]
    assert own == pytest.approx(twin, rel=1e-6)
    if bos:
        result = evaluate(folder, text=Text("t", (words,)), window=length, stride=stride, dtype="float32")
        assert result.scores.perplexity == pytest.approx(math.exp(sum(twin) / len(twin)), rel=1e-5)
        assert (result.scores.tokens, result.stride) == (len(twin), stride)


def test_the_longest_stride_is_the_usual_protocol(folder: Path) -> None:
    words = Text("t", (evaluation_text("demo", "demo").content[:600],))
    usual, strided = (evaluate(folder, text=words, window=32, stride=stride).scores for stride in (None, 31))
    assert usual == strided


def test_differences_from_a_baseline_are_of_the_tokens_that_count(folder: Path, demo_of: Callable[[int], Path]) -> None:
    words = Text("t", (evaluation_text("demo", "demo").content[:600],))
    both = evaluate(folder, demo_of(2), text=words, window=32, stride=7, dtype="float32")
    alone = [evaluate(one, text=words, window=32, stride=7, dtype="float32").scores for one in (folder, demo_of(2))]
    assert both.baseline is not None
    assert both.nll_difference is not None
    assert [both.scores.perplexity, both.baseline.perplexity] == pytest.approx([one.perplexity for one in alone])
    assert both.nll_difference == pytest.approx(math.log(alone[0].perplexity / alone[1].perplexity))  # type: ignore[operator]


def test_papers_perplexity_is_that_of_their_code(model: Any, folder: Path, tmp_path: Path) -> None:
    """As GPTQ's evaluation computes it: mean loss of each window times its length, summed, over all tokens."""
    lines = "".join(f" {line} \n \n" for line in evaluation_text("demo", "demo").content[:1500].splitlines())
    (tmp_path / "wiki.test.raw").write_text(lines)
    seqlen = 48
    rows = [line if line.strip() else "" for line in lines.split("\n")[:-1]]
    joined = "\n\n".join(row + "\n" if row else row for row in rows)
    ids = load_tokenizer(folder)(joined, return_tensors="pt")["input_ids"]
    count, nlls = ids.numel() // seqlen, []
    assert count > 5
    assert ids.numel() % seqlen > 0, "a rest is dropped"
    for i in range(count):
        window = ids[:, i * seqlen : (i + 1) * seqlen]
        with torch.no_grad():
            logits = model(window).logits[:, :-1].contiguous()
        mean = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), window[:, 1:].reshape(-1))
        nlls.append(mean.float() * seqlen)
    expected = float(torch.exp(torch.stack(nlls).sum() / (count * seqlen)))
    text = str(tmp_path / "wiki.test.raw")
    result = evaluate(folder, text=text, window=seqlen, protocol="papers", dtype="float32")
    assert result.scores.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.scores.tokens == count * (seqlen - 1)
    assert result.protocol == "papers"
    usual = evaluate(folder, text=text, window=seqlen, dtype="float32").scores.perplexity
    assert usual != pytest.approx(expected, rel=1e-2)


def test_papers_text_is_the_rows_of_the_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """WikiText's own file gives the same text as the data set on the Hub, where an empty line has no newline."""
    rows = ["", " = Anna = \n", "", " Anna has a ball . \n", " She is at home . \n", ""]
    asked = []

    def load(*given: str, **split: str) -> dict[str, list[str]]:
        asked.append((*given, split["split"]))
        return {"text": rows}

    monkeypatch.setattr("datasets.load_dataset", load)
    (tmp_path / "wiki.test.raw").write_text(LINES)
    assert hub_rows(LINES) == rows
    assert papers_text(None).content == papers_text(str(tmp_path / "wiki.test.raw")).content == "\n\n".join(rows)
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]


def test_what_cannot_be_read_is_one_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", fails)
    (tmp_path / "t.txt").write_text(LINES)
    with pytest.raises(HubError, match=r"the Hub: no route; name the file wiki\.test\.raw by --text"):
        papers_text(None)
    with pytest.raises(CalibrationError, match="reads WikiText-2 or a text file, and owner/data is neither"):
        papers_text("owner/data")
    with pytest.raises(RecipeError, match=r"windows of 2048 tokens, and .* reads at most 256; --seq-len 256 can be"):
        evaluate(folder, text=str(tmp_path / "t.txt"), protocol="papers")
    with pytest.raises(CalibrationError, match="too few for a window of 256; take a smaller --seq-len"):
        evaluate(folder, text=str(tmp_path / "t.txt"), protocol="papers", window=256)
    with pytest.raises(RecipeError, match="--stride is 300; it must be below the window of 256 tokens"):
        evaluate(folder, text=str(tmp_path / "t.txt"), stride=300)
    with pytest.raises(CalibrationError, match="too few to predict one"):
        strided_rows(Text("t", ("",)), load_tokenizer(folder), 32, 4)


def test_a_share_of_the_windows(folder: Path) -> None:
    words = Text("t", (evaluation_text("demo", "demo").content[:3000],))
    whole, tenth = (evaluate(folder, text=words, window=32, limit=limit) for limit in (None, 0.1))
    assert tenth.limit == 0.1
    assert tenth.scores.tokens == 31 * math.ceil(math.ceil(whole.scores.tokens / 31) * 0.1)


def test_one_window_has_no_standard_error(folder: Path, tmp_path: Path) -> None:
    """A dash would be honest, a zero is not."""
    (tmp_path / "t.txt").write_text(evaluation_text("demo", "demo").content[:900])
    code, out, _ = command("eval", folder, "--text", tmp_path / "t.txt", "--limit", 1, "--seq-len", 32)
    assert code == 0
    assert "±" not in out
    assert "limited: at most 1 of the windows of text" in " ".join(out.split())


def test_the_table_says_how_the_text_was_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(evaluation_text("demo", "demo").content[:900])
    options = ["--text", tmp_path / "t.txt", "--seq-len", 32]
    shown = [" ".join(command("eval", folder, *options, *more)[1].split()) for more in (["--stride", 8], [])]
    assert "in windows of 32, which begin 8 tokens apart, in" in shown[0]
    assert "apart" not in shown[1]
    assert "protocol papers: no BOS, the rest dropped" in command("eval", folder, *options, "--protocol", "papers")[1]
    assert "--stride is 40; it must be below the window of 32 tokens" in refused(
        "eval", folder, *options, "--stride", 40
    )


def test_the_user_hears_what_of_the_text_was_left_out(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "Anna has a ball . " * 20}, {"text": None}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    again = shutil.copytree(folder, tmp_path / "again")
    for verb, models in (("eval", [folder]), ("compare", [folder, again])):
        code, _, stderr = command(verb, *models, "--text", tmp_path / "t.jsonl", "--seq-len", 32, "--limit", 1)
        assert code == 0, stderr
        assert "of 2 rows of t.jsonl, 1 are empty and left out" in " ".join(stderr.split())
