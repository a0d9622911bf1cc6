"""Plain text as tasks for PPT, pre-trained prompt tuning (Gu et al., ACL 2022, arXiv 2109.04332).

A source's rows are documents (column `text`), and `task.source.builder` says what is asked about their sentences:

    next_sentence     does `second` follow `first`? PPT's task for pairs of texts
    sentence_choice   which of `options` follows `first`? PPT's task for multiple choice: an option for each label word
    unified_choice    the same with 2 options up to one for each label word, PPT's one format for every classification

A wrong second sentence comes from the same document where it can (hard) or from another one (easy). Half of the wrong
pairs are hard where the document has a sentence for it; of the wrong options one is, as in the authors' code up to six
options. Documents are split into train, dev and test before any pair is made, so the splits share no sentence, and
`task.split_seed` decides every draw.

Different from the authors' code: right is the following sentence alone, not the one before it too; every sentence
gives a right and a wrong pair. Its three classes are in column `relation` (0 another document, 1 the same, 2 next).
PPT's third task, single sentences labelled by another model, needs that model and is left out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise

from iapt.config.errors import UserError
from iapt.config.task import TaskConfig
from iapt.data.files import Row
from iapt.data.formatting import need
from iapt.data.splits import Unit

# Naive: an abbreviation ends a sentence too.
_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)])\s+")
_TRIES = 100  # draws before a sentence of the wanted kind counts as not there

Documents = Sequence[Sequence[str]]


class _TooAlikeError(Exception):
    """No sentence of another document differs from those that it must differ from."""


def build_rows(config: TaskConfig, split: str, units: Sequence[Unit]) -> tuple[list[Unit], str]:
    """One split's documents as the rows of the task, and a note on how many there are.

    Args:
        config: the task; `source.builder` is not none.
        split: train, dev or test.
        units: the split's documents.

    Raises:
        UserError: a row without `text`, too little text for wrong answers.
    """
    documents = []
    for source, number, row in (member for unit in units for member in unit):
        need(config, "source.builder", "text", row, f"row {number} of {source}")
        documents.append(sentences(str(row["text"])))
    usable = [document for document in documents if len(document) > 1]
    if len(usable) < 2:
        raise _too_little(
            config, f"{len(usable)} of the {len(documents)} documents of {split} have two sentences or more"
        )
    rng = random.Random(f"{config.split_seed}/{split}")
    try:
        rows = list(_BUILDERS[config.source.builder](rng, usable, len(config.label_words)))
    except _TooAlikeError:
        raise _too_little(config, f"the documents of {split} repeat the same few sentences") from None
    note = f"{split}: {len(rows):,} rows from {len(usable):,} documents"
    if len(usable) < len(documents):
        note += f"; {len(documents) - len(usable):,} of less than two sentences left out"
    return [[(split, number, row)] for number, row in enumerate(rows, 1)], note


def sentences(text: str) -> list[str]:
    """A text cut after every `.`, `!` and `?` that white space follows; line breaks are white space."""
    return [sentence for sentence in _END.split(" ".join(text.split())) if sentence]


def _next_sentence(rng: random.Random, documents: Documents, words: int) -> Iterator[Row]:
    for number, document in enumerate(documents):
        for i, (first, second) in enumerate(pairwise(document)):
            wrong = _near(rng, document, i) if rng.random() < 0.5 else None
            relation = 0 if wrong is None else 1
            if wrong is None:
                wrong = _far(rng, documents, number, (first, second))
            yield {"first": first, "second": second, "label": 1, "relation": 2}
            yield {"first": first, "second": wrong, "label": 0, "relation": relation}


def _sentence_choice(rng: random.Random, documents: Documents, words: int, fewest: int | None = None) -> Iterator[Row]:
    for number, document in enumerate(documents):
        for i, (first, second) in enumerate(pairwise(document)):
            size = rng.randint(fewest or words, words)
            near = _near(rng, document, i)
            options = [second] if near is None else [second, near]
            while len(options) < size:
                options.append(_far(rng, documents, number, (first, *options)))
            rng.shuffle(options)
            yield {"first": first, "options": options, "label": options.index(second)}


def _unified_choice(rng: random.Random, documents: Documents, words: int) -> Iterator[Row]:
    return _sentence_choice(rng, documents, words, fewest=2)


_BUILDERS: dict[str, Callable[[random.Random, Documents, int], Iterator[Row]]] = {
    "next_sentence": _next_sentence,
    "sentence_choice": _sentence_choice,
    "unified_choice": _unified_choice,
}


def _near(rng: random.Random, document: Sequence[str], i: int) -> str | None:
    """A sentence of the document that is neither sentence i nor beside it, None if none is found."""
    taken, drawn = document[max(0, i - 1) : i + 2], (rng.choice(document) for _ in range(_TRIES))
    return next((sentence for sentence in drawn if sentence not in taken), None)


def _far(rng: random.Random, documents: Documents, number: int, taken: Collection[str]) -> str:
    """A sentence of another document. Raises _TooAlikeError if none is found that is not in `taken`."""
    for _ in range(_TRIES):
        other = rng.randrange(len(documents) - 1)
        found = rng.choice(documents[other + (other >= number)])
        if found not in taken:
            return found
    raise _TooAlikeError


def _too_little(config: TaskConfig, what: str) -> UserError:
    return UserError(
        f"task '{config.name}': too little text for task.source.builder = {config.source.builder}: {what}; wrong "
        "answers are sentences of another document"
    )
