import math

import pytest

from iapt.evaluation.calibration import expected_calibration_error


def row(*probabilities: float) -> list[float]:
    return [math.log(p) - 7.0 for p in probabilities]  # up to a constant


def test_the_gap_is_taken_bin_by_bin():
    scores = [row(0.87, 0.13), row(0.15, 0.85), row(0.45, 0.55), row(0.22, 0.33, 0.45)]
    found = expected_calibration_error(scores, [0, 1, 1, 2], [0, 0, 0, 2], bins=10)
    # Two share a bin, of 0.86 on average and one of them right; a wrong one at 0.55; a right one at 0.45.
    assert found == pytest.approx((2 * abs(0.86 - 0.5) + 0.55 + (1 - 0.45)) / 4)


def test_certainty_is_worth_what_it_hits():
    scores = [[0.0, -800.0], [-900.0, 0.0]]
    assert expected_calibration_error(scores, [0, 1], [0, 1]) == 0
    assert expected_calibration_error(scores, [0, 1], [1, 0]) == 1


def test_the_confidence_is_the_predicted_labels():
    assert expected_calibration_error([row(0.7, 0.3)], [1], [1]) == pytest.approx(0.7)
