"""lm-eval tasks from local definitions: what is asked, against slow twins; what they are called; what is written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_file_datetime,
    get_file_task_name,
    get_results_filenames,
    get_sample_results_filenames,
    make_table,
)
from support import command
from support import refused as refused_command
from transformers import AutoTokenizer

from llmsqueeze.errors import HubError, RecipeError, SqueezeError, UnsupportedError
from llmsqueeze.evaluation.models import OpenModel, open_model
from llmsqueeze.evaluation.tasks import definitions, harness
from llmsqueeze.evaluation.tasks.options import TaskOptions
from llmsqueeze.evaluation.tasks.run import find_tasks
from llmsqueeze.evaluation.tasks.scores import TaskScores
from llmsqueeze.model.blockwise.attention import AttentionInPieces
from llmsqueeze.progress import Progress

CPU = torch.device("cpu")
QUESTIONS = [
    {"context": context, "choices": [" ball .", " a lamp .", " at home ."], "label": label}
    for context, label in (("Anna has a", 0), ("Ben has the", 1), ("Carol is", 2), ("Dan is", 2), ("Emma has a", 0))
]
EXAMPLES = [{"context": f"Example {i} has", "choices": [" one .", " two ."], "label": i % 2} for i in range(6)]
TEXTS = [
    {"text": "Anna has a ball . She is at home ."},
    {"text": "Ben has a lamp ."},
    {"text": " ".join(["The ball is here ."] * 30)},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHOICE = """
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
"""
DEFINITIONS = {
    "own_choice": f"task: own_choice\ntag: own_tag\nfewshot_split: more{CHOICE}",
    "own_fixed": f"task: own_fixed\ntag: own_tag\nnum_fewshot: 0\nfewshot_split: more{CHOICE}",
    "own_lonely": f"task: own_lonely{CHOICE}",
    "own_group": "group: own_group\ntask: [own_choice, own_fixed]\naggregate_metric_list:\n  - metric: acc\n",
    "own_text": (
        "task: own_text\ntest_split: texts\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
        "metric_list:\n  - metric: word_perplexity\n"
    ),
    "own_words": (
        "task: own_words\ntest_split: test\noutput_type: generate_until\ndoc_to_text: context\n"
        "doc_to_target: '{{choices[label]}}'\ngeneration_kwargs:\n  until: ['.']\n  max_gen_toks: 4\n"
        "metric_list:\n  - metric: exact_match\n"
    ),
}


@pytest.fixture(scope="module", autouse=True)
def short_index() -> Iterator[None]:
    """Without the thousands of task definitions that lm-eval reads for seconds."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            definitions, "task_index", lambda path, _: TaskManager(include_path=path, include_defaults=False)
        )
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Definitions of tasks with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    files = {"test": QUESTIONS, "more": EXAMPLES, "texts": TEXTS}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in DEFINITIONS.items():
        splits = ("texts",) if name == "own_text" else ("test",) if name == "own_lonely" else ("test", "more")
        data = "".join(f"    {split}: {folder / split}.jsonl\n" for split in splits)
        source = "" if name == "own_group" else f"dataset_path: json\ndataset_kwargs:\n  data_files:\n{data}"
        (folder / f"{name}.yaml").write_text(text + source)
    return folder


@pytest.fixture(scope="module")
def opened(demo_of: Callable[[int], Path]) -> OpenModel:
    """In bfloat16; its tokenizer adds BOS."""
    return open_model(str(demo_of(2)), CPU, False, "stored")


@pytest.fixture(scope="module")
def chatting(demo_of: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo with a chat template, which writes BOS as the tokenizer does."""
    copy = Path(shutil.copytree(demo_of(1), tmp_path_factory.mktemp("chat") / "chat"))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


def run(opened: OpenModel, folder: Path, names: str, out: Path | None = None, **asked: Any) -> dict[str, TaskScores]:
    limit, batch = asked.pop("limit", None), asked.pop("batch_size", 2)
    options = TaskOptions(**asked, output_path=out, log_samples=out is not None)
    return find_tasks(names.split(","), folder, limit, batch, options).run(opened, Progress())


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    (file,) = out.glob(f"*/samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def prompts(out: Path, task: str) -> list[str]:
    return [one["arguments"]["gen_args_0"]["arg_0"] for one in samples(out, task)]


# --------------------------------------------------------------------------------------------------- slow twins


def log_likelihood(opened: OpenModel, ids: list[int], last: int) -> float:
    """Of the last tokens after those before them: one row, log-softmax in float32, in nats."""
    with torch.no_grad(), AttentionInPieces():
        logits = opened.model(torch.tensor([ids[:-1]])).logits[0]
    assert logits.dtype == torch.bfloat16
    log_p = logits.float().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[i]]) for i in range(len(ids) - last, len(ids)))


def test_choices_are_weighed_in_float32(opened: OpenModel, folder: Path, tmp_path: Path) -> None:
    scores = run(opened, folder, "own_text,own_choice", tmp_path, batch_size=1)["own_choice"]  # BOS again after a text
    tokenizer, right = opened.tokenizer, []
    for one, question in zip(samples(tmp_path, "own_choice"), QUESTIONS, strict=True):
        expected = []
        for choice in question["choices"]:  # type: ignore[attr-defined]
            ids = tokenizer(str(question["context"]) + choice)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            last = len(ids) - len(tokenizer(str(question["context"]))["input_ids"])
            expected.append(log_likelihood(opened, ids, last))
        measured = [float(response[0]) for (response,) in one["resps"]]
        assert measured == pytest.approx(expected, rel=1e-5)
        assert any(abs(value - float(torch.tensor(value).bfloat16())) > 1e-3 for value in measured), "not of bfloat16"
        right.append(float(max(range(3), key=lambda i: measured[i]) == question["label"]))
    assert scores.metrics["acc"] == sum(right) / len(right)
    assert scores.documents == {"acc": dict(enumerate(right))}


def test_a_text_is_read_after_one_bos(opened: OpenModel, folder: Path, tmp_path: Path) -> None:
    """Window by window, as lm-eval cuts a long text; BOS is not asked for after BOS."""
    scores = run(opened, folder, "own_text", tmp_path, batch_size=1)["own_text"]
    bos, length = opened.tokenizer.bos_token_id, 256
    total, words = 0.0, 0
    for one, row in zip(samples(tmp_path, "own_text"), TEXTS, strict=True):
        ids = opened.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        expected = log_likelihood(opened, [bos, *ids[: length - 1]], min(len(ids), length - 1))
        if len(ids) >= length:  # the next window holds what is left, after the tokens before it
            expected = log_likelihood(opened, [bos, *ids[:length]], length)
            rest = len(ids) - length
            expected += log_likelihood(opened, ids[-length - 1 :], rest)
        measured = float(one["resps"][0][0])
        assert measured == pytest.approx(expected, rel=1e-5)
        doubled = log_likelihood(opened, [bos, bos, *ids[: length - 1]], min(len(ids), length - 1) + 1)
        assert abs(measured - doubled) > 1
        total, words = total + expected, words + len(row["text"].split())
    assert opened.tokenizer("a")["input_ids"][0] == bos, "which its tokenizer adds"
    assert scores.metrics == {"word_perplexity": pytest.approx(math.exp(-total / words), rel=1e-5)}


def test_an_error_that_lm_eval_does_not_give_is_a_dash(folder: Path, demo_of: Callable[[int], Path]) -> None:
    options = ["--tasks", "own_text,own_choice", "--include-path", folder, "--device", "cpu"]
    code, out, _ = command("eval", demo_of(1), "--baseline", demo_of(2), *options)
    assert code == 0
    (text,) = [line for line in out.splitlines() if "word_perplexity" in line]
    assert text.count("± –") == 3
    (choice,) = [line for line in out.splitlines() if "own_choice acc" in line]
    assert "± –" not in choice
    (limited,) = [
        line for line in command("eval", demo_of(1), *options, "--limit", 1)[1].splitlines() if " acc " in line
    ]
    assert "± –" in limited


# ------------------------------------------------------------------------------------------------ what is asked


def test_examples_are_those_of_the_seed_and_the_same_for_every_model(
    opened: OpenModel, folder: Path, tmp_path: Path
) -> None:
    scores = run(opened, folder, "own_choice", tmp_path / "a", num_fewshot=2)
    assert list(scores) == ["own_choice (2-shot)"]
    assert scores["own_choice (2-shot)"].settings == {"task": "own_choice", "num_fewshot": 2}
    asked = prompts(tmp_path / "a", "own_choice")
    for prompt, question in zip(asked, QUESTIONS, strict=True):
        assert prompt.count("Example") == 2
        assert prompt.endswith(str(question["context"]))
    options = TaskOptions(num_fewshot=2, output_path=tmp_path / "b", log_samples=True)
    tasks = find_tasks(["own_choice"], folder, options=options)
    for name in ("one", "two"):
        tasks.run(OpenModel(name, opened.model, opened.tokenizer, opened.dtype), Progress())
    for name in ("one", "two"):
        (file,) = (tmp_path / "b" / name).glob("samples_*")
        assert [json.loads(line)["arguments"]["gen_args_0"]["arg_0"] for line in file.read_text().splitlines()] == asked
    run(opened, folder, "own_choice", tmp_path / "c", num_fewshot=2, seed=(0, 1, 1, 1))
    assert prompts(tmp_path / "c", "own_choice") != asked


def test_examples_become_turns_of_a_chat(chatting: Path, folder: Path, tmp_path: Path) -> None:
    opened = open_model(str(chatting), CPU, False, "stored")
    asked: dict[str, Any] = {"num_fewshot": 1, "apply_chat_template": True, "system_instruction": "Be brief."}
    scores = run(opened, folder, "own_choice,own_text", tmp_path, **asked)
    assert list(scores) == ['own_choice (1-shot, chat template, system "Be brief.")', "own_text"]
    for prompt, question in zip(prompts(tmp_path, "own_choice"), QUESTIONS, strict=True):
        lines = prompt.splitlines()
        assert lines[0] == "<s>[system] Be brief."
        assert lines[1].startswith("[user] Example")
        assert lines[2].startswith("[assistant] ")
        assert lines[3:] == [f"[user] {question['context']}", "[assistant] "]
    ids = harness.Harness(opened, 1, None).tok_encode(prompts(tmp_path, "own_choice")[0])
    assert ids.count(opened.tokenizer.bos_token_id) == 1, "tokenizer and template write it both"


def test_generation_follows_the_definition_and_what_is_asked(opened: OpenModel, folder: Path, tmp_path: Path) -> None:
    assert list(run(opened, folder, "own_words", tmp_path / "a")) == ["own_words"]
    scores = run(opened, folder, "own_words", tmp_path / "b", gen_kwargs={"max_gen_toks": 1})
    assert list(scores) == ["own_words (max_gen_toks=1)"]
    four, one = ([row["resps"][0][0] for row in samples(tmp_path / run_, "own_words")] for run_ in "ab")
    assert four != one
    assert all(short == long[: len(short)] for short, long in zip(one, four, strict=True))


def test_batches_are_chosen_by_what_fits(
    opened: OpenModel, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = 4 * 3 * 2 * 1000 * 16
    monkeypatch.setattr(harness, "free_on", lambda _: free)
    assert [harness.batch_that_fits(logits, CPU) for logits in (1000, 1001, 10**9, 10)] == [16, 8, 1, 64]
    monkeypatch.setattr(harness, "free_on", lambda _: None)
    assert harness.batch_that_fits(10**9, CPU) == harness.MOST
    names = "own_choice,own_text,own_words"
    auto, alone = (run(opened, folder, names, batch_size=size) for size in ("auto", 1))
    assert {label: one.metrics.keys() for label, one in auto.items()} == {
        label: one.metrics.keys() for label, one in alone.items()
    }
    assert auto["own_text"].metrics["word_perplexity"] == pytest.approx(
        alone["own_text"].metrics["word_perplexity"], rel=0.05
    )


def test_a_share_of_the_documents(opened: OpenModel, folder: Path) -> None:
    assert len(run(opened, folder, "own_choice", limit=0.3)["own_choice"].documents["acc"]) == 2
    assert len(run(opened, folder, "own_choice", limit=3)["own_choice"].documents["acc"]) == 3


# ------------------------------------------------------------------------------------------ what tasks are called


@pytest.mark.parametrize(
    ("names", "measured"),
    [
        ("own_*ice", ["own_choice"]),
        ("own_[cfg]*", ["own_choice", "own_fixed"]),
        ("own_g*", ["own_choice", "own_fixed", "own_group"]),
        ("own_group", ["own_choice", "own_fixed", "own_group"]),
        ("own_tag", ["own_choice", "own_fixed"]),
        ("own_choice,own_c*,own_choice", ["own_choice"]),
        ("demo_s*", ["demo_stories"]),
        ("FOLDER/own_fixed.yaml", ["own_fixed"]),
    ],
)
def test_tasks_by_wildcard_group_and_file(names: str, measured: list[str], opened: OpenModel, folder: Path) -> None:
    scores = run(opened, folder, names.replace("FOLDER", str(folder)), limit=2)
    assert sorted(scores) == measured
    if "own_group" in scores:
        children = [scores[name].metrics["acc"] for name in measured[:2]]
        assert scores["own_group"].metrics["acc"] == pytest.approx(sum(children) / 2)
        documents = [value for name in measured[:2] for value in scores[name].documents["acc"].values()]
        assert scores["own_group"].documents == {"acc": dict(enumerate(documents))}


def test_lm_evals_own_definitions_are_read_only_if_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take many seconds, and are read once."""
    read: list[bool] = []

    @cache
    def index(path: Path | None, defaults: bool) -> TaskManager:
        read.append(defaults)
        return TaskManager(include_path=path, include_defaults=False)

    monkeypatch.setattr(definitions, "task_index", index)
    find_tasks(["own_choice", "demo_stories"], folder)
    assert read == [False]
    find_tasks(["own_group", "own_t*"], folder)
    assert read == [False, True]


def test_a_task_without_examples_stays_so_and_the_user_hears_of_it(
    opened: OpenModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "note", notes.append)
    tasks = find_tasks(["own_group"], folder, options=TaskOptions(num_fewshot=1), progress=progress)
    assert notes == ["own_fixed is defined without examples in its prompts, and stays so"]
    assert {"own_choice (1-shot)", "own_fixed"} <= set(tasks.run(opened, progress))


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        ("own_choise", {}, "unknown task 'own_choise'; did you mean 'own_choice'?"),
        ("zzz_*", {}, "no task matches 'zzz_*'"),
        ("no/such.yaml", {}, "there is no task definition no/such.yaml"),
        ("FOLDER", {}, "is a folder; name its tasks, and the folder by --include-path"),
        ("own_group,own_choice", {}, "Duplicate task 'own_choice'"),
        (
            "own_choice",
            {"gen_kwargs": {"temperature": 1}},
            "--gen-kwargs is for tasks that generate text; of own_choice",
        ),
        ("own_words", {"gen_kwargs": {"temprature": 1}}, "has 'temprature', which generation does not know; did you"),
        ("own_text", {"num_fewshot": 2}, "--num-fewshot is for tasks with a prompt; of own_text a whole"),
        ("own_text", {"apply_chat_template": True}, "--apply-chat-template is for tasks with a prompt"),
        (
            "own_lonely",
            {"num_fewshot": 1},
            "so prompts could give the answer away; give its definition a fewshot_split",
        ),
        ("own_choice", {"apply_chat_template": True}, "has no chat template for --apply-chat-template"),
        ("own_choice", {"prefix_token_id": 626}, "--prefix-token-id is 626; the tokens of"),
        ("own_choice", {"num_fewshot": 99}, "--num-fewshot is 99; own_choice has 6 examples"),
    ],
)
def test_what_does_not_fit_the_tasks_is_one_line(
    names: str, asked: dict[str, Any], message: str, opened: OpenModel, folder: Path
) -> None:
    with pytest.raises(SqueezeError) as refused:
        run(opened, folder, names.replace("FOLDER", str(folder)), **asked)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_definition_whose_data_is_not_there(opened: OpenModel, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "lost.yaml").write_text((folder / "own_lonely.yaml").read_text().replace("test.jsonl", "lost.jsonl"))
    with pytest.raises(HubError, match=r"lm-eval cannot run .*lost.yaml: "):
        run(opened, tmp_path, str(tmp_path / "lost.yaml"))


# ------------------------------------------------------------------------------------------------- the tokenizer


def without_tokens(folder: Path, copy: Path, *names: str) -> Path:
    """A copy of a model whose tokenizer lacks some tokens, and adds none."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    content = json.loads((copy / "tokenizer.json").read_text()) | {"post_processor": None}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    kept = {key: value for key, value in config.items() if key not in names}
    (copy / "tokenizer_config.json").write_text(json.dumps(kept))
    return copy


def test_a_tokenizer_without_bos_and_eos(demo_of: Callable[[int], Path], folder: Path, tmp_path: Path) -> None:
    bare = without_tokens(demo_of(1), tmp_path / "bare", "bos_token", "eos_token")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    assert tokenizer.bos_token_id is tokenizer.eos_token_id is None
    options = ["--include-path", folder, "--device", "cpu"]
    message = refused_command("eval", bare, "--tasks", "own_text", *options)
    assert "has neither a BOS nor an EOS token" in message
    assert "--prefix-token-id N" in message
    opened = open_model(str(bare), CPU, False, "stored")
    scores = run(opened, folder, "own_text,own_choice", prefix_token_id=1)
    assert list(scores) == ["own_text (prefix 1)", "own_choice (prefix 1)"]
    own = open_model(str(demo_of(1)), CPU, False, "stored")
    assert scores["own_text (prefix 1)"].metrics == run(own, folder, "own_text")["own_text"].metrics
    with pytest.raises(UnsupportedError, match="has no EOS token, which ends generated text"):
        run(opened, folder, "own_words", prefix_token_id=1)


def test_a_template_that_takes_no_system_instruction(chatting: Path, folder: Path, tmp_path: Path) -> None:
    """lm-eval would leave it out, and say so only in its log."""
    copy = Path(shutil.copytree(chatting, tmp_path / "copy"))
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    (copy / "chat_template.jinja").write_text(refusing)
    opened = open_model(str(copy), CPU, False, "stored")
    with pytest.raises(UnsupportedError, match="takes no --system-instruction: no system role"):
        run(opened, folder, "own_choice", apply_chat_template=True, system_instruction="Be brief.")


# ------------------------------------------------------------------------------------------- lm-eval's own files


def test_lm_evals_tools_read_the_results(opened: OpenModel, folder: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"num_fewshot": 1, "seed": (1, 2, 3, 4), "limit": 3}
    scores = run(opened, folder, "own_group", tmp_path / "out", **asked)
    files = [str(path) for path in (tmp_path / "out").rglob("*") if path.is_file()]
    (results,) = get_results_filenames(files)
    logged = get_sample_results_filenames(files)
    assert len(files) == 3
    assert sorted(get_file_task_name(Path(file).name) for file in logged) == ["own_choice", "own_fixed"]
    assert len({get_file_datetime(Path(file).name).removesuffix(".json") for file in files}) == 1
    content = json.loads(Path(results).read_text())
    tables = make_table(content), make_table(content, "groups")
    assert f"{scores['own_choice (1-shot, seed 1,2,3,4)'].metrics['acc']:.4f}" in tables[0]
    assert "own_group" in tables[1]
    assert content["n-shot"] == {"own_choice": 1, "own_fixed": 0}
    assert content["config"]["fewshot_seed"] == 4
    assert content["config"]["limit"] == 3
    assert content["config"]["model_args"]["softmax_dtype"] == "float32"
    assert content["model_name"] == opened.name
    assert content["n-samples"]["own_choice"] == {"original": 5, "effective": 3}
    assert set(content["task_hashes"]) == {"own_choice", "own_fixed"}
    assert content["tokenizer_bos_token"] == ["<s>", "1"]


def test_results_without_samples_and_results_that_cannot_be_written(
    opened: OpenModel, folder: Path, tmp_path: Path
) -> None:
    options = TaskOptions(output_path=tmp_path / "out")
    find_tasks(["own_fixed"], folder, options=options).run(opened, Progress())
    assert [path.name.partition("_")[0] for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["results"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file; name a folder"):
        TaskOptions(output_path=tmp_path / "file")
    with pytest.raises(SqueezeError, match="cannot be made"):
        find_tasks(["own_fixed"], folder, options=TaskOptions(output_path=tmp_path / "file" / "out"))
