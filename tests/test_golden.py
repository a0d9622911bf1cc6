"""What is trained today is what was trained when the curves were written down (tests/golden.py)."""

from __future__ import annotations

import json

import pytest

from tests.golden import FILE, METHODS, curve

WRITTEN = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_curve_is_as_it_was(method: str) -> None:
    found, written = curve(method), WRITTEN[method]
    assert found.keys() == written.keys()
    lengths = {"train_loss": 20, "dev_loss": 5} | ({"held_out_loss": 20} if method == "iapt" else {})
    assert {key: len(values) for key, values in found.items()} == lengths
    for key, values in written.items():
        assert found[key] == pytest.approx(values, abs=1e-4), key


def test_the_curves_are_those_of_different_methods_that_learn() -> None:
    assert set(WRITTEN) == set(METHODS)
    assert len({curves["train_loss"][-1] for curves in WRITTEN.values()}) == len(METHODS)
    assert all(curves["train_loss"][-1] < 0.9 * curves["train_loss"][0] for curves in WRITTEN.values())
