"""Metrics as `evaluate.Metric` classes over scikit-learn, sacrebleu, rouge-score and nltk.

They are defined here because `evaluate.load` by name downloads code. Values are fractions of 1.
Classification metrics take label ids, generation metrics take strings and, for each, a list of one or more
references. Where a metric cannot be computed its value is absent, and an entry `<name>_note` says why.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

from iapt.config.errors import UserError, suggest
from iapt.metrics import writing_systems
from iapt.metrics.answers import exact_match, final_choice, final_number, word_f1

CLASSIFICATION, GENERATION = "classification", "generation"
NEEDS_WORDNET = "skipped: needs wordnet"
_GET_WORDNET = "python -m nltk.downloader wordnet"

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
    counts_words = True

    def _info(self) -> evaluate.MetricInfo:
        return _info("Corpus BLEU", _TEXTS, "Post, 2018, A Call for Clarity in Reporting BLEU Scores")

    def _compute(self, predictions: list[str], references: list[list[str]], tokenizer: str) -> dict[str, Any]:
        # sacrebleu wants one stream per reference number; None fills the streams of those with fewer.
        streams = [
            [refs[i] if i < len(refs) else None for refs in references]
            for i in range(max(len(refs) for refs in references))
        ]
        bleu = bleu_scorer(tokenizer)
        score = bleu.corpus_score(predictions, streams).score
        return {"bleu": score / 100, "bleu_signature": str(bleu.get_signature())}


class RougeL(evaluate.Metric):  # type: ignore[misc]
    """ROUGE-L F of rouge-score, the best over the references, averaged over the predictions; no stemming.

    rouge-score's own tokenizer takes all but a-z and 0-9 for blanks.
    """

    kind = GENERATION
    counts_words = True

    def _info(self) -> evaluate.MetricInfo:
        return _info("ROUGE-L", _TEXTS, "Lin, 2004, ROUGE: A Package for Automatic Evaluation of Summaries")

    def _compute(self, predictions: list[str], references: list[list[str]], tokenizer: str) -> dict[str, Any]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], tokenizer=None if tokenizer == "default" else _LowerCase(tokenizer))
        best = [
            max(scorer.score(ref, prediction)["rougeL"].fmeasure for ref in refs)
            for prediction, refs in zip(predictions, references, strict=True)
        ]
        return {"rouge_l": sum(best) / len(best)}


class _LowerCase:
    """The words of a sacrebleu tokenizer in lower case, as rouge-score asks for them."""

    def __init__(self, name: str) -> None:
        self._split = bleu_scorer(name).tokenizer

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return list(self._split(text.lower()).split())


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


class QaF1Em(evaluate.Metric):  # type: ignore[misc]
    """The mean of F1 and exact match as the scripts of SQuAD v1.1 and ReCoRD compute them.

    Each is the best over the references, averaged over the predictions; normalisation in `iapt.metrics.answers`. The
    mean of the two is what IAPT's series reports (S).
    """

    kind = GENERATION

    def _info(self) -> evaluate.MetricInfo:
        return _info("SQuAD F1 and exact match", _TEXTS, "Rajpurkar et al., 2016, SQuAD: 100,000+ Questions")

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        pairs = list(zip(predictions, references, strict=True))
        f1 = sum(max(word_f1(prediction, ref) for ref in refs) for prediction, refs in pairs) / len(pairs)
        em = sum(any(exact_match(prediction, ref) for ref in refs) for prediction, refs in pairs) / len(pairs)
        return {"qa_f1_em": (f1 + em) / 2, "qa_f1": f1, "qa_em": em}


class Meteor(evaluate.Metric):  # type: ignore[misc]
    """METEOR of nltk, the best over the references, averaged over the predictions.

    Matches are exact, by Porter stem and by WordNet synonym (alpha 0.9, beta 3, gamma 0.5). nltk looks up synonyms by
    stem, so it misses some ("automobil"). The E2E challenge's script runs the Java program, version 1.5, which also
    knows paraphrases and has other weights: its values are not these.
    """

    kind = GENERATION

    def _info(self) -> evaluate.MetricInfo:
        return _info("METEOR", _TEXTS, "Banerjee and Lavie, 2005, METEOR: An Automatic Metric for MT Evaluation")

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.translate.meteor_score import meteor_score

        wordnet = find_wordnet()
        if wordnet is None:
            return {"meteor_note": NEEDS_WORDNET}
        split = NLTKWordTokenizer().tokenize
        scores = [
            meteor_score([split(ref) for ref in refs], split(prediction), wordnet=wordnet)
            for prediction, refs in zip(predictions, references, strict=True)
        ]
        return {"meteor": float(sum(scores) / len(scores))}


class FinalNumber(evaluate.Metric):  # type: ignore[misc]
    """The share of predictions whose `final_number` is that of one of their references (GSM8K's accuracy)."""

    kind = GENERATION

    def _info(self) -> evaluate.MetricInfo:
        return _info("Final number", _TEXTS, "Cobbe et al., 2021, Training Verifiers to Solve Math Word Problems")

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        return {"final_number": _share_equal(final_number, predictions, references)}


class FinalChoice(evaluate.Metric):  # type: ignore[misc]
    """The share of predictions whose `final_choice` is that of one of their references (AQuA's accuracy)."""

    kind = GENERATION

    def _info(self) -> evaluate.MetricInfo:
        return _info("Final choice", _TEXTS, "Ling et al., 2017, Program Induction by Rationale Generation")

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        return {"final_choice": _share_equal(final_choice, predictions, references)}


def _share_equal(read: Callable[[str], Any], predictions: list[str], references: list[list[str]]) -> float:
    hits = []
    for prediction, refs in zip(predictions, references, strict=True):
        answer = read(prediction)
        hits.append(answer is not None and answer in {read(ref) for ref in refs})
    return sum(hits) / len(hits)


def find_wordnet() -> Any:
    """nltk's WordNet reader, or None where its data is not installed (LookupError) or lacks files (OSError)."""
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError):
        return None
    return wordnet


METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "bleu": Bleu,
    "rouge_l": RougeL,
    "exact_match": ExactMatch,
    "meteor": Meteor,
    "qa_f1_em": QaF1Em,
    "final_number": FinalNumber,
    "final_choice": FinalChoice,
}


def check(names: Sequence[str], kind: str, tokenizer: str = "default") -> None:
    """Raises UserError when a name is unknown, its metric does not score `kind` of tasks, or a package is missing."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"task.metrics: unknown metric '{name}'; {suggest(name, METRICS)}")
        if METRICS[name].kind != kind:
            fitting = ", ".join(n for n, metric in METRICS.items() if metric.kind == kind)
            raise UserError(
                f"task.metrics: '{name}' is a metric of {METRICS[name].kind} tasks, this is a {kind} task; "
                f"allowed are {fitting}"
            )
    if tokenizer != "default":
        try:
            _LowerCase(tokenizer)
        except (RuntimeError, ImportError):
            extra = f"sacrebleu[{tokenizer[:2]}]"
            raise UserError(f"task.metric_tokenizer = {tokenizer}: needs a package; pip install '{extra}'") from None
    if names and names[0] == "meteor" and find_wordnet() is None:
        raise UserError(
            f"task.metrics = {list(names)}: the first is what is reported, and meteor needs WordNet ({_GET_WORDNET})"
        )


def notes(names: Sequence[str], tokenizer: str = "default", references: Sequence[str] = ()) -> list[str]:
    """A word about every named metric that cannot be computed here, or cannot read the script of the references."""
    missing = "meteor" in names and find_wordnet() is None
    found = [f"meteor: {NEEDS_WORDNET} ({_GET_WORDNET})"] if missing else []
    return found + writing_systems.notes(
        [name for name in names if not (missing and name == "meteor")], tokenizer, references
    )


def bleu_scorer(tokenizer: str, **options: Any) -> Any:
    """sacrebleu's BLEU with a `task.metric_tokenizer`, and options of its own."""
    from sacrebleu.metrics import BLEU

    return BLEU(**options) if tokenizer == "default" else BLEU(tokenize=tokenizer, **options)


def word_options(name: str, tokenizer: str) -> dict[str, str]:
    """What the named metric has to be told besides predictions and references."""
    return {"tokenizer": tokenizer} if getattr(METRICS[name], "counts_words", False) else {}


def compute(
    names: Sequence[str],
    predictions: Sequence[int] | Sequence[str],
    references: Sequence[int] | Sequence[Any],
    tokenizer: str = "default",
) -> dict[str, Any]:
    """The named metrics over one split.

    Args:
        names: keys of `METRICS`.
        predictions: n label ids, or n strings.
        references: n label ids, or n sequences of one or more strings.
        tokenizer: whose words BLEU and ROUGE-L count, a `task.metric_tokenizer`.

    Returns:
        name -> value as a fraction of 1, in the order of `names`; beside them `bleu_signature` for `bleu`, `qa_f1` and
        `qa_em` for `qa_f1_em`, and `meteor_note` in place of `meteor` where there is no WordNet.

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
            pairs = {"predictions": list(predictions), "references": [_plain(r) for r in references]}
            values |= metric.compute(**pairs, **word_options(name, tokenizer))
    return values


def _plain(reference: Any) -> Any:
    return list(reference) if isinstance(reference, tuple) else reference
