"""The toy world and its three downstream tasks.

What: people have coloured objects in places, and they say what they think of them. From this one small world
come the corpus the tiny backbone was pretrained on (`scripts/tiny_corpus.py`), plain text, and three data sets:

    entailment   a text about a person, an object and a place, and a claim   -> does the claim follow: yes / no
    sentiment    a comment on an object                                      -> is it good / bad
    describe     a record of four fields                                     -> one sentence, scored by BLEU

The plain text (`plain_text`, without labels) tells of a person's two objects: a text, a claim that follows from it,
the next text, its claim. The second object is of another kind, in another sort of place, and the other mood.

A claim names the kind of the object, where the person is, or the person's mood, never a word of the text but the
name: `Mia has a red ball in the park, she loves it.` entails `Mia has a toy.`, `Mia is outside.`, `Mia is happy.`

Why generated: the default run needs no network and no download, and whoever reads a wrong prediction can see at
once why it is wrong. The rows depend on nothing but the task's name and the split, on every machine.

How to use: `rows("entailment", "train")` gives a list of dicts; `python -m iapt.data.toy` prints a few.
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NAMES = ("entailment", "sentiment", "describe")
SPLITS = {"train": 2000, "validation": 200, "test": 400}

# ----------------------------------------------------------------------------------------------------
# The world: a closed vocabulary in which every word is one token of the tiny tokenizer.


def _words(text: str) -> list[str]:
    return text.split()


PEOPLE = _words("Mia Tom Ana Ben Eva Leo Ida Max Zoe Sam Lily Omar Nina Paul Rosa Hugo Emma Jack Vera Karl")
KINDS = {
    "toy": _words("ball kite drum doll puzzle"),
    "tool": _words("hammer saw drill rake ladder"),
    "garment": _words("hat coat scarf shirt glove"),
    "dish": _words("cup plate bowl pan jug"),
}
OBJECTS = [thing for things in KINDS.values() for thing in things]
COLOURS = _words("red blue green black white pink brown grey gold yellow")
WHERE = {
    "inside": _words("school kitchen library hall office"),
    "outside": _words("park garden street yard forest"),
}
PLACES = [place for places in WHERE.values() for place in places]
PRAISE = _words("great lovely nice superb fine useful solid charming perfect handy")
BLAME = _words("awful ugly poor dull weak broken useless horrid noisy flimsy")
LIKES = _words("loves likes enjoys")
DISLIKES = _words("hates dislikes regrets")
SLOTS: dict[str, list[str]] = {"name": PEOPLE, "thing": OBJECTS, "colour": COLOURS, "place": PLACES}


@dataclass(frozen=True)
class Fact:
    """One person's coloured object, where it is, and whether the person is pleased with it."""

    name: str
    thing: str
    colour: str
    place: str
    good: bool

    @property
    def classes(self) -> dict[str, str]:
        """What the fact says without saying it."""
        return {
            "kind": next(kind for kind, things in KINDS.items() if self.thing in things),
            "where": next(where for where, places in WHERE.items() if self.place in places),
            "mood": MOODS[self.good],
        }


MOODS = ("sad", "happy")
CLASSES: dict[str, tuple[str, ...]] = {"kind": tuple(KINDS), "where": tuple(WHERE), "mood": MOODS}
CLAIMS = {"kind": "{name} has a {value}.", "where": "{name} is {value}.", "mood": "{name} is {value}."}
# Sentence forms. The texts of entailment are in the first two; the last is what toy/describe asks for.
FORMS = (
    "{name} has a {colour} {thing} in the {place}",
    "In the {place} {name} has a {colour} {thing}",
    "{name} has a {colour} {thing}",
    "The {colour} {thing} in the {place} belongs to {name}",
)


def draw(rng: random.Random) -> Fact:
    """A fact with every slot drawn independently."""
    name, thing, colour, place = (rng.choice(words) for words in SLOTS.values())
    return Fact(name, thing, colour, place, good=rng.random() < 0.5)


def say(form: str, fact: Fact) -> str:
    """The sentence of this form about this fact, without its full stop."""
    return form.format(name=fact.name, thing=fact.thing, colour=fact.colour, place=fact.place)


def view(rng: random.Random, name: str, good: bool) -> str:
    """An opinion: an adjective, its denial, or a verb."""
    kind = rng.randrange(4)
    if kind == 0:
        return f"{name} {rng.choice(LIKES if good else DISLIKES)} it"
    if kind == 1:
        return f"it is not {rng.choice(BLAME if good else PRAISE)}"
    return f"it is {rng.choice(PRAISE if good else BLAME)}"


def text(rng: random.Random, fact: Fact) -> str:
    """A sentence that states the whole fact."""
    return f"{say(rng.choice(FORMS[:2]), fact)}, {view(rng, fact.name, fact.good)}."


def claim(rng: random.Random, fact: Fact, follows: bool) -> str:
    """A sentence that names one class of the fact, or another class in its place."""
    about = rng.choice(tuple(CLASSES))
    value = fact.classes[about]
    if not follows:
        value = rng.choice([other for other in CLASSES[about] if other != value])
    return CLAIMS[about].format(name=fact.name, value=value)


def comment(rng: random.Random, fact: Fact) -> str:
    """What someone says of a thing: one opinion, or two of which the last counts."""
    opening = say(FORMS[2], fact)
    if rng.random() < 0.3:
        return f"{opening}, {view(rng, fact.name, not fact.good)} but {view(rng, fact.name, fact.good)}."
    return f"{opening}, {view(rng, fact.name, fact.good)}."


def record(rng: random.Random, fact: Fact) -> str:
    """The four fields of a fact in random order."""
    fields = [f"{slot}: {getattr(fact, slot)}" for slot in SLOTS]
    rng.shuffle(fields)
    return ", ".join(fields)


# ----------------------------------------------------------------------------------------------------
# The three downstream tasks, and the plain text.


def _entailment(rng: random.Random, index: int) -> dict[str, Any]:
    fact, label = draw(rng), index % 2  # alternating, so that every split is balanced to the row
    return {"text": text(rng, fact), "claim": claim(rng, fact, follows=label == 1), "label": label}


def _sentiment(rng: random.Random, index: int) -> dict[str, Any]:
    label, fact = index % 2, draw(rng)
    while fact.good != bool(label):
        fact = draw(rng)
    return {"comment": comment(rng, fact), "label": label}


def _describe(rng: random.Random, index: int) -> dict[str, Any]:
    fact = draw(rng)
    return {"record": record(rng, fact), "text": f"{say(FORMS[3], fact)}."}


def _plain_text(rng: random.Random, index: int) -> dict[str, Any]:
    first = draw(rng)
    second = dataclasses.replace(draw(rng), name=first.name)
    while any(second.classes[about] == first.classes[about] for about in CLASSES):
        second = dataclasses.replace(draw(rng), name=first.name)
    return {"text": " ".join(f"{text(rng, fact)} {claim(rng, fact, follows=True)}" for fact in (first, second))}


_MAKERS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "entailment": _entailment,
    "sentiment": _sentiment,
    "describe": _describe,
    "plain_text": _plain_text,
}


def rows(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of one split of one toy task or of the plain text; no input occurs twice, within or across splits.

    Raises:
        ValueError: an unknown name or split.
    """
    if name not in _MAKERS:
        raise ValueError(f"no toy task {name!r}; there are {', '.join(_MAKERS)}")
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    # crc32 and not hash(): Python salts the hash of a string anew in every process.
    rng = random.Random(zlib.crc32(f"iapt/toy/{name}".encode()))
    seen: set[str] = set()
    # The splits come from one stream, so that a later one can avoid the inputs of an earlier one.
    for part, size in SPLITS.items():
        made: list[dict[str, Any]] = []
        while len(made) < size:
            row = _MAKERS[name](rng, len(made))
            # The same fields in another order are the same record, and then the texts agree.
            key = row["text"] if "record" in row else " ".join(str(v) for k, v in row.items() if k != "label")
            if key not in seen:
                seen.add(key)
                made.append(row)
        if part == split:
            # Shuffled, so that the labels do not alternate in the order of the file.
            random.Random(zlib.crc32(f"iapt/toy/{name}/{split}".encode())).shuffle(made)
            return made
    raise AssertionError("unreachable")


if __name__ == "__main__":
    for task in NAMES:
        for row in rows(task, "train")[:6]:
            print(task, row)
