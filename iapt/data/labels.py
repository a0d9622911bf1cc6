"""What a label in the data means: one of the label words, or the index of one.

Both are common, and where the words are numbers one value can be either: with the words 1 to 5 a 1 may be the first
class or the second. What all rows of the task say decides; where they fit both readings, `task.integer_labels` has to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from iapt.config.errors import UserError
from iapt.config.task import TaskConfig

_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def as_word(words: Sequence[str], value: Any) -> int | None:
    """The index of the word that the value is; None if it is none.

    A number is the one word of equal value: 1 and "1.0" are "1", and "01" where that is the word.
    """
    spelled = [value, value.strip()] if isinstance(value, str) else [str(value)]
    if isinstance(value, bool):
        spelled.append(str(value).lower())
    for text in spelled:
        if text in words:
            return words.index(text)
    number = _number(value)
    equal = [i for i, word in enumerate(words) if number is not None and _number(word) == number]
    return equal[0] if len(equal) == 1 else None


def as_index(words: Sequence[str], value: Any) -> int | None:
    """The value as an index of the words; None if it is no whole number, or beyond them.

    What can only be meant as a word is no index: a boolean or a "01" that is itself among the words.
    """
    number = Decimal(value) if isinstance(value, bool) else _number(value)
    if number is None or number != int(number) or int(number) not in range(len(words)):
        return None
    is_word = as_word(words, value) is not None
    if isinstance(value, bool):
        return None if is_word else int(number)
    text = value.strip() if isinstance(value, str) else ""
    return None if text in words and text != str(int(number)) else int(number)


def decide(config: TaskConfig, values: Iterable[Any]) -> str:
    """How the labels of a task are read: `words`, `indices`, or `auto` where no label could be both.

    Args:
        config: the task; its `integer_labels` decides, if it is not `auto`.
        values: the labels of all rows.

    Raises:
        UserError: the labels can be read in two ways, which differ.
    """
    source, words = config.source, config.label_words
    if config.integer_labels != "auto":
        return config.integer_labels
    if source.generator or source.builder != "none":  # what makes the rows numbers the labels
        return "indices"
    distinct = {(type(value), value): value for value in values if isinstance(value, str | int | float)}.values()
    found = [(value, as_word(words, value), as_index(words, value)) for value in distinct]
    differ = [(v, w, i) for v, w, i in found if w is not None and i is not None and w != i]
    if not differ:
        return "auto"
    only_words = [value for value, word, index in found if index is None and word is not None]
    only_indices = [value for value, word, index in found if word is None and index is not None]
    if only_words and not only_indices:
        return "words"
    if only_indices and not only_words:
        return "indices"
    value, word, index = differ[0]
    assert word is not None
    assert index is not None
    why = "every row fits both readings"
    if only_words:
        why = f"{only_indices[0]!r} can only be an index, but {only_words[0]!r} only a word"
    raise UserError(
        f"task '{config.name}': {config.label_column} = {value!r} is the label word {words[word]!r}, or the index of "
        f"{words[index]!r}: {why}; task.integer_labels=words or task.integer_labels=indices decides"
    )


def read_label(config: TaskConfig, value: Any, where: str) -> int:
    """A label's index among the label words.

    Args:
        config: the task; its `integer_labels` is what `decide` found.
        value: as it stands in the row.
        where: names the row, for messages.

    Raises:
        UserError: a value that means none of the words.
    """
    words = config.label_words
    readings = {"words": (as_word,), "indices": (as_index, as_word)}.get(config.integer_labels, (as_word, as_index))
    for reading in readings:
        if (label := reading(words, value)) is not None:
            return label
    allowed = ", ".join(f"{i} ({word})" for i, word in enumerate(words))
    if config.integer_labels == "words":
        allowed = f"{', '.join(words)} (task.integer_labels = words)"
    hidden = "; -1 is how the hub hides the labels of a test split" if str(value) == "-1" else ""
    raise UserError(
        f"task '{config.name}': {config.label_column} = {value!r} in {where} is outside task.label_words; "
        f"allowed are {allowed}{hidden}"
    )


def _number(value: Any) -> Decimal | None:
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    return Decimal(text) if _NUMBER.fullmatch(text) else None
