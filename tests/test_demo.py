"""The demo's stories obey their rules, and the committed model has learned them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest

from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.demo.stories import calibration_text, evaluation_text, questions, stories
from llmsqueeze.demo.task import COUNT, SEED, task_config
from llmsqueeze.demo.words import NOUNS, PEOPLE, PLACES, VERBS

JOB = {person.name: person.job for person in PEOPLE}
PRONOUN = {person.name: person.pronoun for person in PEOPLE}
USE = {word: noun.use for noun in NOUNS for word in (noun.one, noun.many)}
WERE = {word: be for noun in NOUNS for word, be in ((noun.one, "was"), (noun.many, "were"))}
PAST = dict(VERBS)
WHERE = {place.noun: place.where for place in PLACES}

NAME = f"({'|'.join(JOB)})"
THING = rf"(?:the|a|an|some) (\w+ (?:{'|'.join(USE)}))\b"
SPOT = f"(?i:{'|'.join({place.preposition: 0 for place in PLACES})}) the ({'|'.join(WHERE)})"


class Reader:
    """Reads a story's sentences and remembers what they say; it knows nothing of how the story was made."""

    def __init__(self) -> None:
        self.location: dict[str, str] = {}
        self.holder: dict[str, str] = {}
        self.spot: dict[str, str] = {}
        self.asked = ""

    def get(self, thing: str, name: str) -> None:
        self.holder[thing] = name
        self.spot.pop(thing, None)

    def read(self, text: str) -> str:
        """Read the whole sentences of `text`; return the unfinished last one."""
        *whole, last = re.split(r"(?<=[.:]) ", text)
        for sentence in whole:
            self._sentence(sentence)
        return last

    def _sentence(self, s: str) -> None:
        names, things, spots = re.findall(NAME, s), re.findall(THING, s), re.findall(SPOT, s)
        if s.startswith('"Where'):
            self.asked = things[0]
        elif s.startswith('"'):
            return
        elif s.startswith("There"):
            self.spot[things[0]] = spots[0]
        elif re.search(rf"{NAME} the \w+ (was|had)", s):
            self.location[names[0]] = spots[0]
            for thing in things:
                self.get(thing, names[0])
        elif match := re.match(rf"{NAME} (went|walked|ran|hurried) to the (\w+)", s):
            self.location[names[0]] = match[3]
        elif re.match(rf"{NAME} (left|dropped|forgot) the", s):
            self.spot[things[0]] = spots[0]
            del self.holder[things[0]]
        elif re.match(rf"{NAME} found the", s):
            self.location[names[0]] = spots[0]
            self.get(things[0], names[0])
        elif re.match(rf"{NAME} (met|visited) {NAME}", s):
            assert self.location[names[1]] == spots[0]
            self.location[names[0]] = spots[0]
        elif len(names) == 2 and things:
            self._changes_hands(names, things, taken=" from " in s)

    def _changes_hands(self, names: list[str], things: list[str], taken: bool) -> None:
        first, second = names
        assert self.location[first] == self.location[second]
        assert self.holder[things[0]] == (second if taken else first)
        self.get(things[0], first if taken else second)
        if len(things) == 2:
            assert self.holder[things[1]] == second
            self.get(things[1], first)

    def fits(self, last: str, choice: str) -> bool:
        """Whether the unfinished sentence `last` may go on with `choice`."""
        names, things = re.findall(NAME, last), re.findall(THING, last.lower())
        if match := re.match(rf"{NAME}(?: and {NAME})? wanted to (\w+), so$", last):
            return choice == f"{'they' if match[2] else PRONOUN[match[1]]} {PAST[match[3]]}"
        if " used the " in last:
            return choice == USE[things[0].split(" ")[1]]
        if re.search(rf"{NAME} the$", last):
            return choice == JOB[names[0]]
        if last.endswith((" with", " from")):
            return choice == self.holder.get(things[0] if things else self.asked)
        if last.endswith(" had"):
            return self.holder.get(choice.removeprefix("the ")) == names[0]
        if last in ('"They are', '"It is'):
            return choice == WHERE[self.spot[self.asked]]
        if re.match(rf"{NAME} found the", last):
            return choice == WHERE[self.spot[things[0]]]
        if last.startswith("The "):
            return choice == f"{WERE[things[0].split(' ')[1]]} {WHERE[self.spot[things[0]]]}"
        assert re.fullmatch(rf"{NAME} (was|(met|visited) {NAME}|(left|dropped|forgot) the .*)", last), last
        return choice == WHERE[self.location[names[-1]]]


def test_the_same_seed_tells_the_same_stories() -> None:
    assert stories(3, 20) == stories(3, 20)
    assert questions(3, 20) == questions(3, 20)
    assert stories(3, 20) != stories(4, 20)


def test_stories_do_not_depend_on_the_hash_seed_and_need_only_the_standard_library() -> None:
    code = (
        "import sys; from llmsqueeze.demo.stories import questions, stories\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(stories(3, 20), questions(3, 20))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1] == f"{stories(3, 20)} {questions(3, 20)}\n"


def test_stories_are_short_and_start_with_a_capital() -> None:
    for story in stories(5, 200):
        assert 50 <= len(story.split()) <= 170
        assert story[0].isupper()
        assert "  " not in story
        assert re.search(r"[.?!:,]\.", story) is None


def test_calibration_evaluation_and_questions_share_no_story() -> None:
    calibration = set(calibration_text().split("\n\n"))
    evaluation = set(evaluation_text().split("\n\n"))
    assert calibration.isdisjoint(evaluation)
    told = [*calibration, *evaluation]
    # the first two sentences already name the day, a person, a place and things: too many for a chance match
    openings = {". ".join(story.split(". ")[:3]) for story in told}
    contexts = [str(question["context"]) for question in questions(SEED, COUNT)]
    long = [context for context in contexts if context.count(". ") >= 3]
    assert len(long) > COUNT // 2
    assert not any(". ".join(context.split(". ")[:3]) in openings for context in long)


def test_the_labelled_choice_is_the_only_one_that_a_reader_of_the_story_accepts() -> None:
    labels = []
    for question in questions(SEED, COUNT) + questions(99, 200):
        context, choices, label = str(question["context"]), question["choices"], question["label"]
        assert isinstance(choices, list)
        assert len(set(choices)) == 4
        reader = Reader()
        last = reader.read(context)
        assert [reader.fits(last, choice) for choice in choices] == [i == label for i in range(4)], question
        labels.append(label)
    assert all(labels.count(label) > len(labels) / 6 for label in range(4))


def test_the_closing_agrees_with_the_story() -> None:
    for story in stories(11, 150):
        told, closing = story.split(" This is how it ended: ")
        reader = Reader()
        reader.read(f"{told} .")
        for sentence in closing.removesuffix(".").replace("The ", "the ").split(". ")[:-1]:
            if match := re.fullmatch(rf"{NAME} was \w+ the (\w+)", sentence):
                assert reader.location[match[1]] == match[2]
            elif match := re.fullmatch(rf"{NAME} had {THING}", sentence):
                assert reader.holder[match[2]] == match[1]
            elif match := re.fullmatch(rf"{THING} (was|were) with {NAME}", sentence):
                assert reader.holder[match[1]] == match[3]
            else:
                match = re.fullmatch(rf"{THING} (was|were) {SPOT}", sentence)
                assert match is not None, sentence
                assert reader.spot[match[1]] == match[3]


def test_the_model_folder_is_small() -> None:
    names = {path.name for path in MODEL_DIR.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 2_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert loaded.dtype == torch.bfloat16
    return loaded.float()


@pytest.mark.parametrize(
    "text", ["", "Mara had the red lamp.", "naïve Ω 漢字\t\n\n  two  spaces ", "\n\n".join(stories(1, 3))]
)
def test_the_tokenizer_puts_bos_in_front_and_gives_back_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_texts_have_the_promised_sizes(tokenizer: Any) -> None:
    assert 20_000 <= len(tokenizer(evaluation_text())["input_ids"]) <= 40_000
    assert 100_000 <= len(tokenizer(calibration_text())["input_ids"]) <= 150_000


def test_the_model_has_a_low_perplexity(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmsqueeze.demo.train import perplexity

    half = evaluation_text()[: len(evaluation_text()) // 2]
    monkeypatch.setattr("llmsqueeze.demo.train.evaluation_text", lambda: half)
    assert perplexity(model, tokenizer) < 3.2


def test_the_model_is_far_above_chance_on_the_questions(model: Any, tokenizer: Any) -> None:
    """The likeliest of the four choices, with the task's own settings; lm-eval runs it in tests/evaluation."""
    import torch

    delimiter = task_config()["target_delimiter"]
    asked = questions(SEED, COUNT)[:32]
    right = 0
    for question in asked:
        context, choices = str(question["context"]), question["choices"]
        assert isinstance(choices, list)
        start = len(tokenizer(context)["input_ids"])
        scores = []
        for choice in choices:
            ids = torch.tensor([tokenizer(f"{context}{delimiter}{choice}")["input_ids"]])
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
            scores.append(float(log_p.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
        right += scores.index(max(scores)) == question["label"]
    assert right / len(asked) > 0.8
