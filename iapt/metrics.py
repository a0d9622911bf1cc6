"""Metrics as `evaluate.Metric` classes over scikit-learn, sacrebleu and rouge-score.

They are defined here because `evaluate.load` by name downloads code. Values are fractions of 1.
Classification metrics take label ids, generation metrics take strings and, for each, a list of one or more
references.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from iapt.errors import UserError, suggest

CLASSIFICATION, GENERATION = "classification", "generation"

_IDS = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
_TEXTS = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
)


def _info(description: str, features: datasets.Features, citation: str = "") -> evaluate.MetricInfo:
    return evaluate.MetricInfo(description=description, citation=citation, inputs_description="", features=features)


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """The share of predicted label ids that are right."""

    kind = CLASSIFICATION

    def _info(self) -> evaluate.MetricInfo:
        return _info("Accuracy", _IDS)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(evaluate.Metric):  # type: ignore[misc]
    """F1 of each label, averaged without weights (macro).

    An id below 0 stands for an answer that is no label word at all: it counts as an error of the right label,
    and is not a class of its own.
    """

    kind = CLASSIFICATION

    def _info(self) -> evaluate.MetricInfo:
        return _info("Macro F1", _IDS)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        from sklearn.metrics import f1_score

        labels = sorted({i for i in [*references, *predictions] if i >= 0})
        value = f1_score(references, predictions, labels=labels, average="macro", zero_division=0.0)
        return {"f1": float(value)}


class Bleu(evaluate.Metric):  # type: ignore[misc]
    """Corpus BLEU of sacrebleu with all references of each prediction, and its signature."""

    kind = GENERATION

    def _info(self) -> evaluate.MetricInfo:
        return _info("Corpus BLEU", _TEXTS, "Post, 2018, A Call for Clarity in Reporting BLEU Scores")

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        from sacrebleu.metrics import BLEU

        # sacrebleu wants one stream per reference number; None fills the streams of those with fewer.
        streams = [
            [refs[i] if i < len(refs) else None for refs in references]
            for i in range(max(len(refs) for refs in references))
        ]
        bleu = BLEU()
        score = bleu.corpus_score(predictions, streams).score
        return {"bleu": score / 100, "bleu_signature": str(bleu.get_signature())}


class RougeL(evaluate.Metric):  # type: ignore[misc]
    """ROUGE-L F of rouge-score, the best over the references, averaged over the predictions; no stemming."""

    kind = GENERATION

    def _info(self) -> evaluate.MetricInfo:
        return _info("ROUGE-L", _TEXTS, "Lin, 2004, ROUGE: A Package for Automatic Evaluation of Summaries")

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        best = [
            max(scorer.score(ref, prediction)["rougeL"].fmeasure for ref in refs)
            for prediction, refs in zip(predictions, references, strict=True)
        ]
        return {"rouge_l": sum(best) / len(best)}


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
    """The share of predictions equal to one of their references, white space at the ends aside."""

    kind = GENERATION

    def _info(self) -> evaluate.MetricInfo:
        return _info("Exact match", _TEXTS)

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        hits = [
            prediction.strip() in {ref.strip() for ref in refs}
            for prediction, refs in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(hits) / len(hits)}


METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "bleu": Bleu,
    "rouge_l": RougeL,
    "exact_match": ExactMatch,
}


def check(names: Sequence[str], kind: str) -> None:
    """Raises UserError when a name is unknown or its metric does not score `kind` of tasks."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"task.metrics: unknown metric '{name}'; {suggest(name, METRICS)}")
        if METRICS[name].kind != kind:
            fitting = ", ".join(n for n, metric in METRICS.items() if metric.kind == kind)
            raise UserError(
                f"task.metrics: '{name}' is a metric of {METRICS[name].kind} tasks, this is a {kind} task; "
                f"allowed are {fitting}"
            )


def compute(
    names: Sequence[str],
    predictions: Sequence[int] | Sequence[str],
    references: Sequence[int] | Sequence[Any],
) -> dict[str, Any]:
    """The named metrics over one split.

    Args:
        names: keys of `METRICS`.
        predictions: n label ids, or n strings.
        references: n label ids, or n sequences of one or more strings.

    Returns:
        name -> value as a fraction of 1, in the order of `names`, and `bleu_signature` beside `bleu`.

    Raises:
        UserError: an unknown name, or a metric that does not fit label ids (or strings).
        ValueError: no predictions, or another number of references.
    """
    if not len(predictions) or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references")
    check(names, GENERATION if isinstance(predictions[0], str) else CLASSIFICATION)
    values: dict[str, Any] = {}
    # evaluate makes a folder even for metrics kept in memory. One of its own per call means that processes
    # never meet, and that a read-only home does not matter.
    with tempfile.TemporaryDirectory(prefix="iapt-metrics-") as scratch:
        for name in names:
            metric = METRICS[name](keep_in_memory=True, cache_dir=scratch, experiment_id=uuid.uuid4().hex)
            values |= metric.compute(predictions=list(predictions), references=[_plain(r) for r in references])
    return values


def _plain(reference: Any) -> Any:
    return list(reference) if isinstance(reference, tuple) else reference
