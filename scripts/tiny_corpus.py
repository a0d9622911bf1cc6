"""The corpus the tiny backbone is pretrained on: many instructed tasks over the texts of `iapt.data.toy`.

What: a document is a string whose answers stand in square brackets, which the trainer takes out:

    Is it true? Text: Mia has a red ball in the park, Mia loves it. Line: Mia is inside. Answer: [no]
    Comment: Tom has a blue saw, it is not weak. Would Tom buy it again? Answer: [yes]

Why so: over the same texts an instruction selects which of many questions is answered, often with the same words
and the opposite meaning (`Is it true?`, `Is it false?`). It stands before the texts, after them, or both. The
downstream tasks have no instruction, so the frozen backbone cannot know which question is asked, and a prompt or an
adapter has only to supply it.

What pretraining never sees, though downstream does: the marks `Note:` and `Claim:` over these texts (the words
themselves occur, as marks of word lists, so neither is untrained). Downstream layouts:

    Note: <text> Claim: <claim> Answer:        Note: <comment> Answer:        Note: <record> Answer:

How to look at it: `python scripts/tiny_corpus.py`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `iapt`, from any checkout
from iapt.data import toy

# A question: its wordings, and its answers when the line is false and when it is true.
TRUE = [
    (("Is it true?", "Does it follow?"), ("no", "yes")),
    (("True or false?",), ("false", "true")),
]
FALSE = [
    (("Is it false?", "Does it clash?"), ("yes", "no")),
    (("Say the opposite, true or false?",), ("true", "false")),
]
# The same over a comment: when it is bad, and when it is good.
GOOD = [
    (("Good or bad?", "What is the opinion?"), ("bad", "good")),
    (("Would {name} buy it again?",), ("no", "yes")),
    (("Happy or sad?",), ("sad", "happy")),
]
BAD = [
    (("Say the opposite, good or bad?", "What is the opposite opinion?"), ("good", "bad")),
    (("Is it a complaint?",), ("yes", "no")),
    (("How does a rival feel?",), ("happy", "sad")),
]
CLASS = {
    "kind": ("Which kind?", "What kind of thing?"),
    "where": ("Inside or outside?", "Where?"),
    "mood": ("Happy or sad?", "Which mood?"),
}
SLOT = {"name": ("Who?",), "thing": ("Which thing?",), "colour": ("Which colour?",), "place": ("Which place?",)}
STYLES = ("Write it short.", "Write it long.", "Write the place first.", "Write the thing first.")
BARE = 0.1  # share of documents without an instruction, once the plain stage is over
Question = tuple[tuple[str, ...], tuple[str, str]]


def _place(rng: random.Random, body: str, phrase: str, answer: str, plain: bool) -> str:
    """The body with its instruction before, after or around it, or now and then with none."""
    where = rng.random()
    if not plain and where < BARE:
        return f"{body} Answer: [{answer}]"
    where = rng.random()
    before, after = where < 0.6 or where > 0.9, where >= 0.6
    return f"{f'{phrase} ' * before}{body}{f' {phrase}' * after} Answer: [{answer}]"


def _ask(rng: random.Random, fact: toy.Fact) -> tuple[str, str]:
    """A question on the fact, and the answer: one of its classes, or one of its words."""
    if rng.random() < 0.7:
        about = rng.choice(tuple(CLASS))
        return rng.choice(CLASS[about]), fact.classes[about]
    slot = rng.choice(tuple(SLOT))
    return rng.choice(SLOT[slot]), getattr(fact, slot)


def pair(rng: random.Random, plain: bool) -> str:
    """A text, a line, one question about the two."""
    fact, follows = toy.draw(rng), rng.random() < 0.5
    questions: list[Question] = TRUE if plain or rng.random() < 0.5 else FALSE
    phrases, words = rng.choice(questions)
    body = f"{rng.choice(('Text', 'Story'))}: {toy.text(rng, fact)} "
    body += f"{rng.choice(('Line', 'Guess'))}: {toy.claim(rng, fact, follows)}"
    if not plain and rng.random() < 0.2:
        phrase, answer = _ask(rng, fact)
        return _place(rng, body, phrase, answer, plain)
    return _place(rng, body, rng.choice(phrases), words[follows], plain)


def lines(rng: random.Random, plain: bool) -> str:
    """A text and several lines, each with its own question: many comparisons for the price of one text."""
    fact = toy.draw(rng)
    parts = [f"{rng.choice(('Text', 'Story'))}: {toy.text(rng, fact)}"]
    for _ in range(rng.randint(3, 5)):
        follows = rng.random() < 0.5
        phrases, words = rng.choice(TRUE if plain or rng.random() < 0.5 else FALSE)
        line = f"{rng.choice(('Line', 'Guess'))}: {toy.claim(rng, fact, follows)}"
        phrase = rng.choice(phrases)
        parts.append(f"{phrase} {line}" if rng.random() < 0.6 else f"{line} {phrase}")
        parts.append(f"Answer: [{words[follows]}].")
    return " ".join(parts)


def question(rng: random.Random, plain: bool) -> str:
    """A text and one question."""
    fact = toy.draw(rng)
    phrase, answer = _ask(rng, fact)
    return _place(rng, f"{rng.choice(('Text', 'Story'))}: {toy.text(rng, fact)}", phrase, answer, plain=True)


def questions(rng: random.Random, plain: bool) -> str:
    """A text and several questions."""
    fact = toy.draw(rng)
    parts = [f"{rng.choice(('Text', 'Story'))}: {toy.text(rng, fact)}"]
    for _ in range(rng.randint(3, 5)):
        phrase, answer = _ask(rng, fact)
        parts.append(f"{phrase} Answer: [{answer}].")
    return " ".join(parts)


def opinion(rng: random.Random, plain: bool) -> str:
    """A comment and one question about it."""
    fact = toy.draw(rng)
    body = f"{rng.choice(('Comment', 'View'))}: {toy.comment(rng, fact)}"
    if rng.random() < 0.15:
        slot = rng.choice(("name", "thing", "colour"))
        return _place(rng, body, rng.choice(SLOT[slot]), getattr(fact, slot), plain)
    phrases, words = rng.choice(GOOD if plain or rng.random() < 0.5 else BAD)
    return _place(rng, body, rng.choice(phrases).format(name=fact.name), words[fact.good], plain)


def words(rng: random.Random, plain: bool) -> str:
    """Words by themselves and the class of each: the lexicon that the texts take for granted."""
    about = rng.choice(("kind", "where", "mood", "good"))
    mark = rng.choice(("Word", "Note", "Claim"))
    parts = []
    for _ in range(rng.randint(2, 6)):
        fact = toy.draw(rng)
        if about in ("mood", "good"):
            word = rng.choice(toy.PRAISE + toy.LIKES if fact.good else toy.BLAME + toy.DISLIKES)
            answer = fact.classes["mood"] if about == "mood" else ("bad", "good")[fact.good]
        else:
            word, answer = (fact.thing if about == "kind" else fact.place), fact.classes[about]
        parts.append(f"{mark}: {word} Answer: [{answer}].")
    return " ".join([{"good": "Good or bad?"}.get(about) or rng.choice(CLASS[about]), *parts])


def record(rng: random.Random, plain: bool) -> str:
    """A record: one of its fields, one of four sentences, or a list."""
    fact = toy.draw(rng)
    body = f"{rng.choice(('Record', 'Card'))}: {toy.record(rng, fact)}"
    task = rng.random()
    if task < 0.2:
        slot = rng.choice(tuple(SLOT))
        return _place(rng, body, rng.choice(SLOT[slot]), getattr(fact, slot), plain)
    if task < 0.35:
        listed = f"{fact.name}, {fact.thing}, {fact.colour}, {fact.place}"
        return _place(rng, body, "Write a list.", listed, plain)
    style = rng.randrange(len(STYLES))
    form = (toy.FORMS[2], toy.FORMS[0], toy.FORMS[1], toy.FORMS[3])[style]
    return _place(rng, body, STYLES[style], f"{toy.say(form, fact)}.", plain)


def document(rng: random.Random, progress: float) -> str:
    """One document at this point (0..1) of the curriculum.

    The lexicon and single questions come first, comparing next, and the inverted questions last: a bit and its
    inverse together give no gradient to a model that cannot yet read the bit.
    """
    early, plain = progress < 0.1, progress < 0.35
    makers = (words, questions, question, opinion, record, lines, pair)
    weights = (4, 5, 1, 2, 1, 1, 0) if early else (1, 2, 1, 3, 2, 5, 1) if plain else (0.5, 1, 1, 3, 3, 4, 4)
    return rng.choices(makers, weights)[0](rng, plain)


PROBES = {
    "words": words,
    "question": question,
    "plain_pair": lambda rng, plain: pair(rng, plain=True),
    "pair": pair,
    "plain_opinion": lambda rng, plain: opinion(rng, plain=True),
    "opinion": opinion,
    "record": record,
}


def vocabulary() -> list[str]:
    """Documents that hold every word of the world many times: what the tokenizer is trained on."""
    rng = random.Random(0)
    return [
        document(rng, progress).replace("[", "").replace("]", "") for progress in (0.0, 0.2, 1.0) for _ in range(5000)
    ]


if __name__ == "__main__":
    shown = random.Random(1)
    for stage in (0.0, 0.2, 1.0):
        for _ in range(16):
            print(document(shown, stage))
