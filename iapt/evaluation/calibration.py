"""How far a classifier's confidence is from its accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def expected_calibration_error(
    scores: Sequence[Sequence[float]], predicted: Sequence[int], labels: Sequence[int | None], bins: int = 15
) -> float:
    """The mean gap between confidence and accuracy over bins of equal width, weighted by their sizes (Guo et al., ICML
    2017, section 2).

    Args:
        scores: one row an example, its labels' log-probabilities up to a constant; rows may differ in length.
        predicted: each example's predicted label, whose probability is the confidence.
        labels: the right ones.
        bins: how many.

    Returns:
        0 to 1.
    """
    found: dict[int, list[tuple[float, bool]]] = {}
    for row, label, right in zip(scores, predicted, labels, strict=True):
        highest = max(row)
        confidence = math.exp(row[label] - highest) / sum(math.exp(score - highest) for score in row)
        # A bin holds its upper end: (0, 1/bins], ..., (1 - 1/bins, 1].
        found.setdefault(math.ceil(confidence * bins), []).append((confidence, label == right))
    gaps = (abs(sum(confidence - hit for confidence, hit in members)) for members in found.values())
    return sum(gaps) / len(labels)
