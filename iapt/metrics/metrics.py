"""Metrics over scikit-learn, sacrebleu, rouge-score and nltk, which are imported when they are asked.

Values are fractions of 1.
Classification metrics take label ids, generation metrics take strings and, for each, a list of one or more
references. Where a metric cannot be computed its value is absent, and an entry `<name>_note` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from iapt.config.errors import UserError, suggest
from iapt.metrics import writing_systems
from iapt.metrics.answers import exact_match, final_choice, final_number, word_f1

CLASSIFICATION, GENERATION = "classification", "generation"
NEEDS_WORDNET = "skipped: needs wordnet"
_GET_WORDNET = "python -m nltk.downloader wordnet"


class Metric:
    """A metric over one split.

    Attributes:
        kind: of the tasks that it scores.
        counts_words: whether `compute` is told whose words to count.
    """

    kind: ClassVar[str]
    counts_words: ClassVar[bool] = False

    def compute(self, predictions: Any, references: Any, **options: str) -> dict[str, Any]:
        """Values by name, see `compute` of this module."""
        raise NotImplementedError


class Accuracy(Metric):
    """The share of predicted label ids that are right."""

    kind = CLASSIFICATION

    def compute(self, predictions: list[int], references: list[int], **options: str) -> dict[str, Any]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(Metric):
    """F1 of each label, averaged without weights (macro).

    An id below 0 stands for an answer that is no label word at all: it counts as an error of the right label,
    and is not a class of its own.
    """

    kind = CLASSIFICATION

    def compute(self, predictions: list[int], references: list[int], **options: str) -> dict[str, Any]:
        from sklearn.metrics import f1_score

        labels = sorted({i for i in [*references, *predictions] if i >= 0})
        value = f1_score(references, predictions, labels=labels, average="macro", zero_division=0.0)
        return {"f1": float(value)}


class Bleu(Metric):
    """Corpus BLEU of sacrebleu with all references of each prediction, and its signature.

    Post, 2018, A Call for Clarity in Reporting BLEU Scores.
    """

    kind = GENERATION
    counts_words = True

    def compute(self, predictions: list[str], references: list[list[str]], **options: str) -> dict[str, Any]:
        # sacrebleu wants one stream per reference number; None fills the streams of those with fewer.
        streams = [
            [refs[i] if i < len(refs) else None for refs in references]
            for i in range(max(len(refs) for refs in references))
        ]
        bleu = bleu_scorer(options["tokenizer"])
        score = bleu.corpus_score(predictions, streams).score
        return {"bleu": score / 100, "bleu_signature": str(bleu.get_signature())}


class RougeL(Metric):
    """ROUGE-L F of rouge-score, the best over the references, averaged over the predictions; no stemming.

    rouge-score's own tokenizer takes all but a-z and 0-9 for blanks.

    Lin, 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
    """

    kind = GENERATION
    counts_words = True

    def compute(self, predictions: list[str], references: list[list[str]], **options: str) -> dict[str, Any]:
        from rouge_score.rouge_scorer import RougeScorer

        tokenizer = options["tokenizer"]
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


class ExactMatch(Metric):
    """The share of predictions equal to one of their references, white space at the ends aside."""

    kind = GENERATION

    def compute(self, predictions: list[str], references: list[list[str]], **options: str) -> dict[str, Any]:
        hits = [
            prediction.strip() in {ref.strip() for ref in refs}
            for prediction, refs in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(hits) / len(hits)}


class QaF1Em(Metric):
    """The mean of F1 and exact match as the scripts of SQuAD v1.1 and ReCoRD compute them.

    Each is the best over the references, averaged over the predictions; normalisation in `iapt.metrics.answers`. The
    mean of the two is what IAPT's series reports. Rajpurkar et al., 2016, SQuAD: 100,000+ Questions.
    """

    kind = GENERATION

    def compute(self, predictions: list[str], references: list[list[str]], **options: str) -> dict[str, Any]:
        pairs = list(zip(predictions, references, strict=True))
        f1 = sum(max(word_f1(prediction, ref) for ref in refs) for prediction, refs in pairs) / len(pairs)
        em = sum(any(exact_match(prediction, ref) for ref in refs) for prediction, refs in pairs) / len(pairs)
        return {"qa_f1_em": (f1 + em) / 2, "qa_f1": f1, "qa_em": em}


class Meteor(Metric):
    """METEOR of nltk, the best over the references, averaged over the predictions.

    Matches are exact, by Porter stem and by WordNet synonym (alpha 0.9, beta 3, gamma 0.5). nltk looks up synonyms by
    stem, so it misses some ("automobil"). The E2E challenge's script runs the Java program, version 1.5, which also
    knows paraphrases and has other weights: its values are not these.

    Banerjee and Lavie, 2005, METEOR: An Automatic Metric for MT Evaluation.
    """

    kind = GENERATION

    def compute(self, predictions: list[str], references: list[list[str]], **options: str) -> dict[str, Any]:
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


class FinalNumber(Metric):
    """The share of predictions whose `final_number` is that of one of their references (GSM8K's accuracy).

    Cobbe et al., 2021, Training Verifiers to Solve Math Word Problems.
    """

    kind = GENERATION

    def compute(self, predictions: list[str], references: list[list[str]], **options: str) -> dict[str, Any]:
        return {"final_number": _share_equal(final_number, predictions, references)}


class FinalChoice(Metric):
    """The share of predictions whose `final_choice` is that of one of their references (AQuA's accuracy).

    Ling et al., 2017, Program Induction by Rationale Generation.
    """

    kind = GENERATION

    def compute(self, predictions: list[str], references: list[list[str]], **options: str) -> dict[str, Any]:
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


METRICS: dict[str, type[Metric]] = {
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
    """Return a note about every named metric that cannot be computed here, or cannot read the
    script of the references.
    """
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
    """Return what the named metric has to be told besides predictions and references."""
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
    for name in names:
        pairs = list(predictions), [_plain(r) for r in references]
        values |= METRICS[name]().compute(*pairs, **word_options(name, tokenizer))
    return values


def _plain(reference: Any) -> Any:
    return list(reference) if isinstance(reference, tuple) else reference
