"""Reading an answer out of a generated text, as the data sets' own scripts do it. Pure functions of strings."""

from __future__ import annotations

import re
import string
from collections import Counter
from decimal import Decimal

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# A minus belongs to the number unless it follows a word or a bracket, as in "5-3".
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def normalize_answer(text: str) -> str:
    """Lower case, then no ASCII punctuation, then no articles, then one blank between words.

    As in the official evaluation script of SQuAD v1.1 (Rajpurkar et al., 2016), whose normalisation ReCoRD's (Zhang et
    al., 2018) shares.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> bool:
    """Say whether the two are equal once normalised."""
    return normalize_answer(prediction) == normalize_answer(reference)


def word_f1(prediction: str, reference: str) -> float:
    """F1 of the two normalised texts as bags of words; 0 where they share none, even if both are empty.

    The scripts of SQuAD v2.0 and what follows them (torchmetrics, transformers) give two empty texts 1.
    """
    words, right = normalize_answer(prediction).split(), normalize_answer(reference).split()
    shared = sum((Counter(words) & Counter(right)).values())
    return 2 * shared / (len(words) + len(right)) if shared else 0.0


def final_number(text: str) -> Decimal | None:
    """The number after the last `####` (GSM8K's mark) or, without that mark, the last one of the text; None: none.

    Thousands may have commas, and a dollar sign may stand before: "$1,080" is 1080.
    """
    _, mark, tail = text.rpartition("####")
    found = _NUMBER.findall(tail)
    return Decimal(re.sub(r"[$,]", "", found[0 if mark else -1])) if found else None


def final_choice(text: str) -> str | None:
    """The last of the letters A to E that stands alone; None: none does."""
    found = re.findall(r"\b[A-E]\b", text)
    return found[-1] if found else None
