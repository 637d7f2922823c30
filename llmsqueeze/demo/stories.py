"""Short stories about who has what and where things are, written from a seed so that a wrong word is wrong.

A story keeps a small world: three people, each at a place, and three things, each with a person or lying
at a place. Every event is told and changes the world; the closing tells how the world is at the end. A
sentence may have a blank whose filling the story so far determines; the questions are cut there.
"""

from __future__ import annotations

import random

from llmsqueeze.demo.world import Sentence, Story

CALIBRATION_SEED = 101
EVALUATION_SEED = 202
CALIBRATION_STORIES = 800
EVALUATION_STORIES = 200

# the kinds of blank that are asked about. Not `place` and `thing`, on which the demo model is hardly better
# than chance, nor `job`, which it keeps even at 2 bits: neither would show what rounding does
KINDS = ("holder", "number", "verb", "use")


def write(rng: random.Random) -> list[Sentence]:
    """The sentences of one story."""
    return Story(rng).told


def _join(sentences: list[Sentence]) -> str:
    return " ".join(sentence.text for sentence in sentences)


def stories(seed: int, count: int) -> list[str]:
    """`count` stories; the same seed gives the same stories."""
    rng = random.Random(seed)
    return [_join(write(rng)) for _ in range(count)]


def calibration_text() -> str:
    """The built-in calibration text, stories separated by blank lines."""
    return "\n\n".join(stories(CALIBRATION_SEED, CALIBRATION_STORIES))


def evaluation_text() -> str:
    """The built-in evaluation text, stories separated by blank lines."""
    return "\n\n".join(stories(EVALUATION_SEED, EVALUATION_STORIES))


def questions(seed: int, count: int) -> list[dict[str, str | int | list[str]]]:
    """`count` stories cut at a blank: `context`, four `choices`, and `label`, the index of the right one.

    The kinds of question take turns as far as the stories have them.
    """
    rng = random.Random(seed)
    asked: list[dict[str, str | int | list[str]]] = []
    while len(asked) < count:
        told = write(rng)
        kind = KINDS[len(asked) % len(KINDS)]
        cuts = [index for index, sentence in enumerate(told) if sentence.kind == kind]
        if not cuts:
            continue
        cut = rng.choice(cuts)
        sentence = told[cut]
        choices = [sentence.answer, *sentence.wrong]
        rng.shuffle(choices)
        context = f"{_join(told[:cut])} {sentence.before}".strip()
        asked.append({"context": context, "choices": choices, "label": choices.index(sentence.answer)})
    return asked
