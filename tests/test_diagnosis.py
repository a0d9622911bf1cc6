"""What a run says about itself, and when it says nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from iapt.runs.diagnosis import Facts, diagnose

GOOD = Facts(
    trainable_params=1000, metric="accuracy", zero_shot=0.5, test=0.9, answers=["no", "yes"] * 200, majority=0.5,
    count=400, dev_losses=[(0, 0.75), (25, 0.5), (50, 0.3)], best_step=50, steps=50, total=50, learning_rate=0.003,
)  # fmt: skip
WITHIN = "test 50.2 is within one standard error (2.5) of zero-shot 50.0"


def note(**changes: Any) -> str | None:
    return diagnose(dataclasses.replace(GOOD, **changes))


def test_a_run_that_explains_itself_gets_none():
    assert note() is None


FLAT = {"test": 0.5025, "dev_losses": [(0, 0.75), (25, 0.7), (50, 0.69)]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainable_params": 0, "test": 0.5, "dev_losses": []}, "reference: trains nothing"),
        (
            {"best_step": 0, "dev_losses": [(0, 0.75), (50, 0.76)]},
            "dev loss never fell below its start (0.75): try another method.learning_rate (now 0.003)",
        ),
        (
            {"best_step": 0, "dev_losses": [(0, 0.75), (50, 8.1)]},
            "dev loss never fell below its start (0.75), it rose to 8.10: try another method.learning_rate (now 0.003)",
        ),
        ({"answers": ["yes"] * 392 + ["no"] * 8}, "answers 'yes' to 98% of test"),
        ({"answers": [None] * 80 + ["no"] * 320}, "20% of test answers are no label word"),
        (FLAT, f"{WITHIN}; dev loss fell 0.75 -> 0.69 and was still falling: more steps?"),
        (
            {**FLAT, "best_step": 25, "dev_losses": [(0, 0.75), (25, 0.69), (50, 0.7)]},
            f"{WITHIN}; dev loss fell 0.75 -> 0.69 by step 25",
        ),
        (
            {**FLAT, "best_step": 25, "dev_losses": [(0, 0.75), (25, 0.69), (50, 1.3)], "total": 150},
            f"{WITHIN}; dev loss fell 0.75 -> 0.69 by step 25, then rose to 1.30, stopped early at 50 of 150",
        ),
        (  # the lowest one was not kept
            {**FLAT, "dev_losses": [(0, 0.75), (25, 0.1), (50, 0.69)]},
            f"{WITHIN}; dev loss fell 0.75 -> 0.69 and was still falling: more steps?",
        ),
        (
            {"best_step": 25, "dev_losses": [(0, 0.75), (20, 0.1), (25, 0.76), (50, 0.77)]},
            "dev loss never fell below its start (0.75): try another method.learning_rate (now 0.003)",
        ),
        ({**FLAT, "answers": ["no"] * 400}, f"answers 'no' to 100% of test; {WITHIN}"),
        ({"test": 0.4, "dev_losses": []}, "test 40.0 is below zero-shot 50.0"),
        (
            {**FLAT, "zero_shot": None, "dev_losses": []},
            "test 50.2 is within one standard error (2.5) of the majority's share 50.0",
        ),
        (
            {"metric": "bleu", "zero_shot": 0.2, "test": 0.2, "answers": [], "majority": None, "dev_losses": []},
            "test 20.0 is not above zero-shot 20.0",
        ),
    ],
)
def test_notes(changes: dict[str, Any], expected: str):
    assert note(**changes) == expected


def test_when_there_is_nothing_to_say():
    # As one-sided as the labels themselves.
    assert note(answers=["yes"] * 396 + ["no"] * 4, majority=0.97, test=0.97, zero_shot=0.6) is None
    # More than one standard error above, by little; a metric without one, above by anything.
    assert note(test=0.53) is None
    assert note(metric="f1", test=0.501) is None
    assert note(metric="bleu", zero_shot=None, answers=[], majority=None) is None


def test_the_error_is_the_larger_of_both():
    # Zero-shot's own, 0.2, would not reach so far.
    assert "within one standard error (0.4) of zero-shot 0.2" in str(note(zero_shot=0.002, test=0.005))
