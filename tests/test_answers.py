"""Answers out of texts, against pairs worked out from the data sets' own scripts."""

from __future__ import annotations

from decimal import Decimal

import pytest

from iapt.metrics.answers import exact_match, final_choice, final_number, normalize_answer, word_f1


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Denver\tBroncos!", "denver broncos"),
        ("an apple, a pear and the plum", "apple pear and plum"),
        ("theatre Anna another", "theatre anna another"),
        ("U.S.", "us"),
        ("24–10", "24–10"),  # only ASCII punctuation goes
        ("$1,000", "1000"),
        ("Levi's", "levis"),
        ("A.", ""),  # the dot goes first, so what is left is an article
        ("the-end", "theend"),
        ("", ""),
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "reference", "f1", "em"),
    [
        ("the Denver Broncos", "Denver Broncos", 1.0, True),
        ("Broncos", "Denver Broncos", 2 / 3, False),
        ("Denver Denver", "Denver Broncos", 0.5, False),  # words count as often as both have them
        ("Carolina Panthers", "Denver Broncos", 0.0, False),
        ("", "Denver Broncos", 0.0, False),
        ("the", "a", 0.0, True),  # no word is shared: version 1.1's F1 is 0 where version 2.0's is 1
    ],
)
def test_f1_and_exact_match(prediction: str, reference: str, f1: float, em: bool) -> None:
    assert word_f1(prediction, reference) == pytest.approx(f1)
    assert exact_match(prediction, reference) is em


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("He had 3.\n#### 1,080", "1080"),
        ("#### 5 (not 6)", "5"),
        ("4 or 5 apples", "5"),
        ("it costs $1,234.50.", "1234.5"),
        ("x = -3.5", "-3.5"),
        ("-$5", "-5"),
        ("8-3", "3"),
        ("1,2345", "2345"),
        ("about .5", "0.5"),
        ("7.", "7"),
        ("#### none, though 3 before", "3"),
    ],
)
def test_final_number(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "I had 3.\n#### unknown"])
def test_no_final_number(text: str) -> None:
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("text", "choice"),
    [("The answer is E.", "E"), ("(B)", "B"), ("A, then C", "C"), ("Because", None), ("f", None), ("", None)],
)
def test_final_choice(text: str, choice: str | None) -> None:
    assert final_choice(text) == choice
