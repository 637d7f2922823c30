"""Short stories about people, things and places, generated from a seed, in which a wrong word is wrong for certain.

A story has a small world: three people, each at a place, and three things, each with a person or at a place. Every
event changes the world and is a sentence; the last sentences give the state of the world at the end. A sentence can
have a blank that the story so far determines; a question is a story cut at a blank.
"""

from __future__ import annotations

import random
from functools import cache

from llmsqueeze.demo.world import Sentence, Story

CALIBRATION_SEED = 101
EVALUATION_SEED = 202
CALIBRATION_STORIES = 800
EVALUATION_STORIES = 200

# the kinds of blank in questions. The demo model is hardly better than chance on `place` and `thing`, and keeps `job`
# even at 2 bits: none of them would show the effect of rounding
KINDS = ("holder", "number", "verb", "use")


def _join(sentences: list[Sentence]) -> str:
    return " ".join(sentence.text for sentence in sentences)


def stories(seed: int, count: int) -> list[str]:
    """`count` stories; the same seed gives the same stories."""
    rng = random.Random(seed)
    return [_join(Story(rng).sentences) for _ in range(count)]


@cache
def calibration_text() -> str:
    """The built-in calibration text, stories separated by blank lines."""
    return "\n\n".join(stories(CALIBRATION_SEED, CALIBRATION_STORIES))


@cache
def evaluation_text() -> str:
    """The built-in evaluation text, stories separated by blank lines."""
    return "\n\n".join(stories(EVALUATION_SEED, EVALUATION_STORIES))


def questions(seed: int, count: int) -> list[dict[str, str | int | list[str]]]:
    """`count` stories cut at a blank: `context`, four `choices`, and `label`, the index of the right one.

    The kinds take turns; a story without the kind in turn is skipped.
    """
    rng = random.Random(seed)
    asked: list[dict[str, str | int | list[str]]] = []
    while len(asked) < count:
        sentences = Story(rng).sentences
        kind = KINDS[len(asked) % len(KINDS)]
        cuts = [index for index, sentence in enumerate(sentences) if sentence.kind == kind]
        if not cuts:
            continue
        cut = rng.choice(cuts)
        sentence = sentences[cut]
        choices = [sentence.answer, *sentence.wrong]
        rng.shuffle(choices)
        context = f"{_join(sentences[:cut])} {sentence.before}".strip()
        asked.append({"context": context, "choices": choices, "label": choices.index(sentence.answer)})
    return asked
