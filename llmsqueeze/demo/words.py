"""The word lists of the stories. The job of a name and the use of a thing never change."""

from __future__ import annotations

from typing import NamedTuple


class Person(NamedTuple):
    """A character; `pronoun` is the subject form and `other` the object form."""

    name: str
    job: str
    pronoun: str
    other: str


class Noun(NamedTuple):
    """A thing that a person can own, and its use."""

    one: str
    many: str
    use: str


class Place(NamedTuple):
    """A place and the preposition that goes with it."""

    preposition: str
    noun: str

    @property
    def where(self) -> str:
        """The phrase for a position there."""
        return f"{self.preposition} the {self.noun}"


def _entries(listing: str) -> list[list[str]]:
    """The words of each comma-separated entry."""
    return [entry.split() for entry in listing.split(",")]


_WOMEN = (
    "Mara baker, Ilse tailor, Nadia sailor, Freya miller, Greta doctor, Hanna painter, Olga farmer, "
    "Petra teacher, Rosa gardener, Tilda clockmaker, Vera singer, Wanda hunter, Anouk weaver, Bea potter"
)
_MEN = (
    "Tobin sailor, Oskar baker, Emil doctor, Felix singer, Hugo miller, Ivan hunter, Jonas teacher, "
    "Karl weaver, Leo painter, Milo clockmaker, Nils tailor, Otto potter, Pavel gardener, Rufus farmer"
)


def _people(listing: str, pronoun: str, other: str) -> tuple[Person, ...]:
    return tuple(Person(name, job, pronoun, other) for name, job in _entries(listing))


PEOPLE = _people(_WOMEN, "she", "her") + _people(_MEN, "he", "him")

_NOUNS = """
lamp lamps to read at night
apple apples to bake a pie
kettle kettles to boil some water
rope ropes to tie up the boat
coat coats to keep warm
basket baskets to carry bread
drum drums to make a loud noise
spoon spoons to stir the soup
brush brushes to clean the floor
candle candles to light the cellar
hammer hammers to mend a chair
pillow pillows to rest a while
mirror mirrors to look at a new hat
bucket buckets to fetch milk
needle needles to sew a shirt
shovel shovels to dig a hole
feather feathers to tickle the cat
whistle whistles to call the dog
button buttons to close a jacket
bottle bottles to hold some juice
ladder ladders to reach the roof
blanket blankets to cover the baby
pencil pencils to draw a map
net nets to catch fish
key keys to open the gate
coin coins to pay for lunch
stone stones to build a wall
shell shells to hear the sea
bell bells to wake the village
wheel wheels to fix the cart
knife knives to cut the cheese
box boxes to hide a letter
"""


def _noun(line: str) -> Noun:
    one, many, use = line.split(" ", 2)
    return Noun(one, many, use)


NOUNS = tuple(_noun(line) for line in _NOUNS.strip().splitlines())

ADJECTIVES = tuple(
    adjective
    for (adjective,) in _entries(
        "red, green, blue, yellow, white, black, old, new, tiny, heavy, shiny, wooden, broken, pretty, "
        "round, striped, dusty, golden"
    )
)

PLACES = tuple(
    Place(preposition, noun)
    for preposition, noun in _entries(
        "in garden, on bridge, at market, by river, in kitchen, at school, on hill, by lake, in forest, "
        "at station, on beach, by well, in barn, at mill, on island, by fountain, in tower, at harbour"
    )
)

# base and past form: the model must learn the past forms one by one
VERBS = tuple(
    (base, past)
    for base, past in _entries(
        "swim swam, sing sang, run ran, draw drew, sleep slept, write wrote, dig dug, fish fished, "
        "dance danced, ride rode, dream dreamt, climb climbed, skate skated, knit knitted, sail sailed, "
        "think thought, cook cooked, row rowed, play played, weave wove, hide hid, jump jumped, fly flew, "
        "pray prayed"
    )
)

SPANS = ("until noon", "all day", "for an hour", "until dark", "for a while", "as always")
GLAD = ("glad", "happy", "proud", "merry")
CROSS = ("cross", "sad", "angry", "upset")
TIMES = (
    "One cold morning",
    "One warm day",
    "Early in spring",
    "Late in autumn",
    "On a quiet Sunday",
    "Long ago",
)
WEATHER = (
    "the sun was bright",
    "it rained a little",
    "the wind was strong",
    "there was snow everywhere",
    "the sky was grey",
    "the birds were loud",
)
ENDINGS = (
    "That evening everyone slept well.",
    "Nobody said another word.",
    "It had been a long day.",
    "Then the moon came up.",
    "And so the story ends.",
    "Tomorrow they would meet again.",
)
