"""Why a row of the table is what it is: a short note about a run that anyone would ask about."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

ONE_SIDED = 0.95  # this share of one answer is a note's worth, unless the labels themselves are so distributed
NO_LABEL = 0.1  # so is this share of answers that are none of the label words
ROSE = 1.2  # the last dev loss over the best that is called a rise


@dataclass(frozen=True)
class Facts:
    """What a run knows about itself at its end.

    Attributes:
        trainable_params: how many parameters it trained.
        metric: the name of the reported one; `zero_shot` and `test` are its values, fractions of 1.
        zero_shot: the bare backbone's, None if it was not scored.
        answers: the predicted label word of every test example, None for an answer that is none; [] if the
            task has no labels.
        majority: share of test's commonest label, None if the task has none.
        count: test examples.
        dev_losses: (step, nats a token) in order; the first is the untrained start.
        best_step: the step whose adapter was kept.
        steps: optimiser steps taken, of `total` allowed ones.
        learning_rate: the trainer's.
    """

    trainable_params: int
    metric: str
    zero_shot: float | None
    test: float
    answers: Sequence[str | None]
    majority: float | None
    count: int
    dev_losses: Sequence[tuple[int, float]]
    best_step: int
    steps: int
    total: int
    learning_rate: float


def diagnose(facts: Facts) -> str | None:
    """A note, its parts joined by "; ", or None for a run that explains itself.

    Every run gets one that trained nothing, whose dev loss never fell, whose test answers are nearly all the
    same, or whose test value is not above the bare backbone's (the majority's share if that was not scored): for
    accuracies by more than a standard error, sqrt(p (1 - p) / n), for other metrics by anything.
    """
    if facts.trainable_params == 0:
        return "reference: trains nothing"
    found = [note for note in (_loss(facts), _answers(facts)) if note]
    compared = _comparison(facts)
    if compared:
        found.append(compared)
        if len(found) == 1 and facts.dev_losses:
            found.append(_course(facts))
    return "; ".join(found) or None


def _loss(facts: Facts) -> str | None:
    if not facts.dev_losses:
        return None
    start, last = facts.dev_losses[0][1], facts.dev_losses[-1][1]
    if _kept(facts) >= start:
        end = f", it rose to {last:.2f}" if last > ROSE * start else ""
        return (
            f"dev loss never fell below its start ({start:.2f}){end}: try another method.learning_rate "
            f"(now {facts.learning_rate:g})"
        )
    return None


def _answers(facts: Facts) -> str | None:
    if not facts.answers:
        return None
    counts = Counter(facts.answers)
    missing = counts.pop(None, 0) / len(facts.answers)
    if missing >= NO_LABEL:
        return f"{missing:.0%} of test answers are no label word"
    word, times = counts.most_common(1)[0]
    share = times / len(facts.answers)
    if share >= ONE_SIDED and (facts.majority is None or facts.majority < ONE_SIDED):
        return f"answers {word!r} to {share:.0%} of test"
    return None


def _comparison(facts: Facts) -> str | None:
    """How test stands to the baseline where it is not above it."""
    name = "zero-shot" if facts.zero_shot is not None else "the majority's share"
    base = facts.zero_shot
    if base is None and facts.metric == "accuracy":
        base = facts.majority
    if base is None:
        return None
    error = 0.0
    if facts.metric == "accuracy":
        error = max(math.sqrt(p * (1 - p) / facts.count) for p in (base, facts.test))
    test, value = f"test {100 * facts.test:.1f}", f"{name} {100 * base:.1f}"
    if facts.test < base - error:
        return f"{test} is below {value}"
    if error and facts.test <= base + error:
        return f"{test} is within one standard error ({100 * error:.1f}) of {value}"
    return f"{test} is not above {value}" if facts.test <= base else None


def _kept(facts: Facts) -> float:
    """The kept adapter's dev loss: not always the lowest one, a method may say what is too early to be kept."""
    return dict(facts.dev_losses)[facts.best_step]


def _course(facts: Facts) -> str:
    """How training went, for a run whose dev loss fell and whose test value did not follow."""
    start, best = facts.dev_losses[0][1], _kept(facts)
    last_step, last = facts.dev_losses[-1]
    fell = f"dev loss fell {start:.2f} -> {best:.2f}"
    if facts.best_step == last_step:
        return f"{fell} and was still falling: more steps?"
    rose = f"by step {facts.best_step}, then rose to {last:.2f}" if last > ROSE * best else f"by step {facts.best_step}"
    early = f", stopped early at {facts.steps} of {facts.total}" if facts.steps < facts.total else ""
    return f"{fell} {rose}{early}"
