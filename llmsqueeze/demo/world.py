"""The world of a story: people at places, things that change owners, and the sentences about them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from llmsqueeze.demo.words import (
    ADJECTIVES,
    CROSS,
    ENDINGS,
    GLAD,
    NOUNS,
    PEOPLE,
    PLACES,
    SPANS,
    TIMES,
    VERBS,
    WEATHER,
    Noun,
    Person,
    Place,
)


@dataclass(frozen=True)
class Sentence:
    """One sentence: `before`, then the blank's filling `answer` (may be empty), then `after`.

    `wrong`: fillings that contradict the story, the most plausible first.
    """

    before: str
    answer: str = ""
    after: str = ""
    kind: str = ""
    wrong: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The sentence with its blank filled."""
        return self.before + (f" {self.answer}" if self.answer else "") + self.after


@dataclass
class Thing:
    """A thing, or several of a kind; it has a `holder`, or it lies at a `spot`."""

    adjective: str
    noun: Noun
    plural: bool
    holder: Person | None
    spot: Place

    @property
    def name(self) -> str:
        """The definite phrase for it."""
        return f"the {self.adjective} {self.noun.many if self.plural else self.noun.one}"

    @property
    def first(self) -> str:
        """The indefinite phrase for it, used when it is first mentioned."""
        article = "some" if self.plural else "an" if self.adjective[0] in "aeiou" else "a"
        return f"{article} {self.name.removeprefix('the ')}"

    @property
    def was(self) -> str:
        """`was` or `were`."""
        return "were" if self.plural else "was"

    @property
    def them(self) -> str:
        """`it` or `them`."""
        return "them" if self.plural else "it"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


@dataclass
class Story:
    """A story as it is written: the world, and the sentences so far."""

    rng: random.Random
    people: list[Person] = field(init=False)
    place: dict[str, Place] = field(init=False)  # by name of the person
    things: list[Thing] = field(init=False)
    sentences: list[Sentence] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        self.people = rng.sample(PEOPLE, 3)
        self.place = {person.name: rng.choice(PLACES) for person in self.people}
        owners = [*self.people, *self.people, None]
        self.things = [
            Thing(adjective, noun, rng.random() < 0.5, rng.choice(owners), rng.choice(PLACES))
            for adjective, noun in zip(rng.sample(ADJECTIVES, 3), rng.sample(NOUNS, 3), strict=True)
        ]
        self._open()
        for _ in range(rng.randint(2, 5)):
            self._event()
        self._close()

    def tell(
        self, before: str, answer: str = "", after: str = ".", kind: str = "", wrong: tuple[str, ...] = ()
    ) -> None:
        """Append a sentence to the story."""
        self.sentences.append(Sentence(before, answer, after, kind, wrong))

    def belongings(self, person: Person) -> list[Thing]:
        """The things that `person` has."""
        return [thing for thing in self.things if thing.holder == person]

    def others(self, *people: Person) -> list[Person]:
        """The story's people other than `people`, in their order."""
        return [person for person in self.people if person not in people]

    # the wrong fillings

    def wrong_names(self, holder: Person) -> tuple[str, ...]:
        """The other people of the story, then a stranger."""
        stranger = self.rng.choice([person for person in PEOPLE if person not in self.people])
        return (*(person.name for person in self.others(holder)), stranger.name)

    def wrong_places(self, right: Place) -> tuple[Place, ...]:
        """Three places other than `right`, those of the story first."""
        in_story = [*self.place.values(), *(thing.spot for thing in self.things if thing.holder is None)]
        pool = [*in_story, *self.rng.sample(PLACES, 4)]
        return tuple(place for place in dict.fromkeys(pool) if place != right)[:3]

    def wrong_things(self, holder: Person) -> tuple[str, ...]:
        """Three things that `holder` does not have: those of the story first, then some with other adjectives."""
        has = [thing.name for thing in self.belongings(holder)]
        mixed = [f"the {a.adjective} {b.name.split(' ')[2]}" for a in self.things for b in self.things if a is not b]
        pool = [*(thing.name for thing in self.things), *self.rng.sample(mixed, len(mixed))]
        return tuple(name for name in pool if name not in has)[:3]

    # the opening

    def _open(self) -> None:
        rng = self.rng
        self.tell(f"{rng.choice(TIMES)} {rng.choice(WEATHER)}")
        for person in self.people:
            has = " and ".join(thing.first for thing in self.belongings(person)) or "nothing at all"
            jobs = sorted({other.job for other in PEOPLE if other.job != person.job})
            wrong = tuple(rng.sample(jobs, 3))
            where = self.place[person.name].where
            rest = f" was {where} with {has}." if rng.random() < 0.5 else f" had {has} and was {where}."
            self.tell(f"{person.name} the", person.job, rest, "job", wrong)
        for thing in self.things:
            if thing.holder is None:
                self.tell(f"There {thing.was} {thing.first} {thing.spot.where}")

    # the events

    def _event(self) -> None:
        events: list[Callable[[], bool]] = [
            self._give,
            self._give,
            self._take,
            self._leave,
            self._find,
            self._find,
            self._go,
            self._use,
            self._want,
            self._ask,
            self._trade,
        ]
        while not self.rng.choice(events)():
            pass

    def _pick(self, owned: bool) -> Thing | None:
        pool = [thing for thing in self.things if (thing.holder is not None) == owned]
        return self.rng.choice(pool) if pool else None

    def _meet(self, walker: Person, host: Person) -> None:
        """Bring `walker` to `host`."""
        here = self.place[host.name]
        if self.place[walker.name] != here:
            wrong = tuple(place.where for place in self.wrong_places(here))
            verb = self.rng.choice(("met", "visited"))
            self.tell(f"{walker.name} {verb} {host.name}", here.where, ".", "place", wrong)
            self.place[walker.name] = here

    def _give(self) -> bool:
        if (thing := self._pick(owned=True)) is None or (giver := thing.holder) is None:
            return False
        taker = self.rng.choice(self.others(giver))
        self._meet(giver, taker)
        verb = self.rng.choice(("gave", "handed", "sold"))
        self.tell(f"{giver.name} {verb} {taker.name} {thing.name}")
        thing.holder = taker
        if self.rng.random() < 0.4:
            self.tell(f"{taker.name} was {self.rng.choice(GLAD)}")
        return True

    def _take(self) -> bool:
        if (thing := self._pick(owned=True)) is None or (loser := thing.holder) is None:
            return False
        taker = self.rng.choice(self.others(loser))
        self._meet(taker, loser)
        verb = self.rng.choice(("took", "stole", "borrowed"))
        self.tell(f"{taker.name} {verb} {thing.name} from", loser.name, ".", "holder", self.wrong_names(loser))
        thing.holder = taker
        if self.rng.random() < 0.4:
            self.tell(f"{loser.name} was {self.rng.choice(CROSS)}")
        return True

    def _trade(self) -> bool:
        if (mine := self._pick(owned=True)) is None or (yours := self._pick(owned=True)) is None:
            return False
        left, right = mine.holder, yours.holder
        if left is None or right is None or left == right:
            return False
        self._meet(left, right)
        self.tell(f"{left.name} gave {right.name} {mine.name} for {yours.name}")
        mine.holder, yours.holder = right, left
        return True

    def _leave(self) -> bool:
        if (thing := self._pick(owned=True)) is None or (person := thing.holder) is None:
            return False
        here = self.place[person.name]
        wrong = tuple(place.where for place in self.wrong_places(here))
        verb = self.rng.choice(("left", "dropped", "forgot"))
        self.tell(f"{person.name} {verb} {thing.name}", here.where, ".", "place", wrong)
        thing.holder, thing.spot = None, here
        return True

    def _find(self) -> bool:
        if (thing := self._pick(owned=False)) is None:
            return False
        person = self.rng.choice(self.people)
        wrong = tuple(place.where for place in self.wrong_places(thing.spot))
        verb = self.rng.choice(("kept", "took"))
        self.tell(
            f"{person.name} found {thing.name}",
            thing.spot.where,
            f" and {verb} {thing.them}.",
            "place",
            wrong,
        )
        thing.holder, self.place[person.name] = person, thing.spot
        return True

    def _go(self) -> bool:
        person, place = self.rng.choice(self.people), self.rng.choice(PLACES)
        if self.place[person.name] == place:
            return False
        self.place[person.name] = place
        self.tell(f"{person.name} {self.rng.choice(('went', 'walked', 'ran', 'hurried'))} to the {place.noun}")
        return True

    def _use(self) -> bool:
        if (thing := self._pick(owned=True)) is None or thing.holder is None:
            return False
        wrong = tuple(noun.use for noun in self.rng.sample(NOUNS, 4) if noun != thing.noun)[:3]
        self.tell(f"{thing.holder.name} used {thing.name}", thing.noun.use, ".", "use", wrong)
        return True

    def _want(self) -> bool:
        doer = self.rng.choice(self.people)
        company = [p for p in self.others(doer) if self.place[p.name] == self.place[doer.name]]
        subject, pronoun = doer.name, doer.pronoun
        if company:
            subject, pronoun = f"{doer.name} and {company[0].name}", "they"
        (verb, past), (_, other) = self.rng.sample(VERBS, 2)
        wrong_pronouns = [word for word in ("she", "he", "they") if word != pronoun]
        wrong = (f"{wrong_pronouns[0]} {past}", f"{wrong_pronouns[1]} {past}", f"{pronoun} {other}")
        span = self.rng.choice(SPANS)
        self.tell(f"{subject} wanted to {verb}, so", f"{pronoun} {past}", f" {span}.", "verb", wrong)
        return True

    def _ask(self) -> bool:
        thing = self.rng.choice(self.things)
        pool = self.others(thing.holder) if thing.holder else self.people
        asker, speaker = self.rng.sample(pool, 2)
        are, they = ("are", "They") if thing.plural else ("is", "It")
        self.tell(f'"Where {are} {thing.name}?" asked {asker.name}')
        end = f'," said {speaker.name}.'
        if thing.holder is None:
            wrong = tuple(place.where for place in self.wrong_places(thing.spot))
            self.tell(f'"{they} {are}', thing.spot.where, end, "place", wrong)
        else:
            self.tell(f'"{they} {are} with', thing.holder.name, end, "holder", self.wrong_names(thing.holder))
        return True

    # the closing

    def _close(self) -> None:
        facts = [partial(self._tell_thing, thing) for thing in self.things]
        facts += [partial(self._tell_person, person) for person in self.people]
        self.rng.shuffle(facts)
        self.sentences.append(Sentence("This is how it ended:"))
        for fact in facts[:5]:
            fact()
        self.sentences.append(Sentence(self.rng.choice(ENDINGS)))

    def _tell_thing(self, thing: Thing) -> None:
        if (holder := thing.holder) is None:
            right, (other, *_) = thing.spot.where, self.wrong_places(thing.spot)
            bad = "was" if thing.plural else "were"
            wrong = (f"{bad} {right}", f"{thing.was} {other.where}", f"{bad} {other.where}")
            self.tell(_capital(thing.name), f"{thing.was} {right}", ".", "number", wrong)
        elif self.rng.random() < 0.5:
            self.tell(f"{holder.name} had", thing.name, ".", "thing", self.wrong_things(holder))
        else:
            self.tell(
                f"{_capital(thing.name)} {thing.was} with",
                holder.name,
                ".",
                "holder",
                self.wrong_names(holder),
            )

    def _tell_person(self, person: Person) -> None:
        here = self.place[person.name]
        wrong = tuple(place.where for place in self.wrong_places(here))
        self.tell(f"{person.name} was", here.where, ".", "place", wrong)
