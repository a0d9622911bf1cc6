"""Test predictions as sums over examples, from which a metric can be had on any resample of the examples.

accuracy, exact match, ROUGE-L and every other mean over examples: one number an example. BLEU: its n-gram counts and
lengths. Macro F1: true positives, false positives and false negatives of each label. What a metric is on all examples
must equal the run's own summary; predictions that do not reproduce it are not used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iapt.metrics.metrics import CLASSIFICATION, METRICS, bleu_scorer, word_options
from iapt.report.runs import Run

Array = NDArray[np.float64]
TOLERANCE = 1e-6  # of a recomputed metric, as a fraction of 1


@dataclass(frozen=True)
class Outcomes:
    """One run's outcomes on the n test examples.

    Attributes:
        statistics: (n, k), to be summed over examples.
        value: (..., k) sums over as many examples as there are -> (...) values of the metric, fractions of 1.
        references: the expected answers, by which two runs' examples are held to be the same.
    """

    statistics: Array
    value: Callable[[Array], Array]
    references: tuple[Any, ...]


@functools.cache
def outcomes(run: Run, metric: str) -> Outcomes | str:
    """A run's outcomes under a metric, or why there are none."""
    records = run.predictions
    if not records:
        return "no test predictions in predictions.jsonl"
    if metric not in METRICS:
        return f"{metric} is not computed from predictions.jsonl"
    classified = METRICS[metric].kind == CLASSIFICATION
    try:
        found, wanted = _labels(run, records) if classified else _texts(records)
    except (KeyError, TypeError, ValueError):
        return "predictions.jsonl does not say which answers were expected"
    # Runs from before there was this setting have each metric's own.
    tokenizer = run.settings.get("task.metric_tokenizer", "default")
    statistics, value = _statistics(metric, found, wanted, tokenizer)
    references = tuple(str(w) for w in wanted)
    recomputed, recorded = float(value(statistics.sum(0))), run.value(metric)
    if not isinstance(recorded, int | float) or abs(recomputed - recorded) > TOLERANCE:
        return f"predictions.jsonl gives {metric} {recomputed:.6f}, summary.json has {recorded}"
    return Outcomes(statistics, value, references)


def _labels(run: Run, records: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
    # `reference` is the response that the label word stands in.
    response = str(run.settings["task.response"])
    ids = {response.replace("{label}", word): i for i, word in enumerate(run.settings["task.label_words"])}
    return [int(r["label"]) for r in records], [ids[r["reference"]] for r in records]


def _texts(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    return [str(r["text"]) for r in records], [[str(x) for x in r["references"]] for r in records]


def _statistics(
    metric: str, found: Sequence[Any], wanted: Sequence[Any], tokenizer: str
) -> tuple[Array, Callable[[Array], Array]]:
    if metric == "bleu":
        return _bleu(found, wanted, tokenizer)
    if metric == "f1":
        return _f1(found, wanted)
    if metric == "accuracy":
        column = np.array(found) == np.array(wanted)
    else:
        scorer, options = METRICS[metric](), word_options(metric, tokenizer)
        column = np.array([scorer.compute([f], [w], **options)[metric] for f, w in zip(found, wanted, strict=True)])
    count = len(found)
    return column.astype(float)[:, None], lambda sums: sums[..., 0] / count


def _bleu(
    found: Sequence[str], wanted: Sequence[Sequence[str]], tokenizer: str
) -> tuple[Array, Callable[[Array], Array]]:
    from sacrebleu.metrics import BLEU

    scorer = bleu_scorer(tokenizer, effective_order=True)  # only the counts are used, and those do not depend on it
    scores = [scorer.sentence_score(f, list(w)) for f, w in zip(found, wanted, strict=True)]
    table = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=float)

    def one(sums: Array) -> float:
        n = (len(sums) - 2) // 2
        whole = [int(x) for x in sums]
        return BLEU.compute_bleu(whole[:n], whole[n : 2 * n], whole[-2], whole[-1], smooth_method="exp").score / 100

    return table, lambda sums: np.apply_along_axis(one, -1, sums)


def _f1(found: Sequence[int], wanted: Sequence[int]) -> tuple[Array, Callable[[Array], Array]]:
    labels = range(max([*found, *wanted]) + 1)
    predicted, expected = (np.array(ids)[:, None] == np.array(labels) for ids in (found, wanted))
    hits, false, missed = predicted & expected, predicted & ~expected, ~predicted & expected

    def value(sums: Array) -> Array:
        hit, other = sums[..., : len(labels)], sums[..., len(labels) :]
        seen = hit + other > 0  # a label that occurs nowhere has no F1
        scores = np.divide(2 * hit, 2 * hit + other, out=np.zeros_like(hit), where=seen)
        return scores.sum(-1) / np.maximum(seen.sum(-1), 1)

    return np.hstack([hits, false.astype(float) + missed]).astype(float), value
