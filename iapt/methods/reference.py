"""The rows of a table that train nothing: what the trained methods are measured against.

`zero_shot` is the bare backbone. `in_context` puts demonstrations before every instruction (Brown et al., NeurIPS
2020). `calibrated` takes the backbone's preference for one label or another out of its scores: contextual
calibration (Zhao et al., ICML 2021) with the prior estimated from task inputs, as batch calibration does (Zhou et
al., ICLR 2024).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from iapt.config.errors import UserError
from iapt.config.fields import at_least
from iapt.config.method import MethodConfig
from iapt.data.batch import Batch
from iapt.data.task import Example, Task
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.method import Method, Passes

MOST_LABELS = 256  # the prior's buffer has one size, since the backbone alone must tell an adapter's shapes


@dataclass
class ZeroShotConfig(MethodConfig):
    """Nothing to set; `learning_rate` is what every method has, and no step is taken with it."""


@dataclass
class InContextConfig(MethodConfig):
    """`shots`: demonstrations before an instruction, as many as fit; `joiner`: what stands behind each."""

    shots: int = at_least(4, 1)
    joiner: str = "\n\n"


@dataclass
class CalibratedConfig(MethodConfig):
    """`examples`: how many training instructions, their labels unused, the prior is estimated from."""

    examples: int = at_least(64, 1)


class Reference(Method):
    """A method that changes nothing: loss, scores and generated texts are the bare backbone's."""


class Calibrated(Method):
    """Scores less the log of the label prior, so that labels the backbone favours on any input lose that favour.

    Where `task.normalize_scores` divides scores by label lengths, it does so after this. The prior is one over all
    label words: where rows have options of their own, a row without some word counts for that word too.

    Attributes:
        log_prior: (MOST_LABELS,) float32 buffer: the labels' log prior in nats, then zeros.
        labels: () float32 buffer: how many labels there are, 0 before `fit` and for tasks without.
    """

    adjusts_scores = True

    log_prior: Tensor
    labels: Tensor

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.examples = examples
        self.register_buffer("log_prior", torch.zeros(MOST_LABELS))
        self.register_buffer("labels", torch.zeros(()))

    def fit(self, model: Passes, batches: Iterable[Batch]) -> None:
        """prior = the mean of softmax(scores) over the first `examples` instructions, Zhou et al.'s estimate.

        Raises:
            UserError: more than MOST_LABELS labels.
        """
        found: list[Tensor] = []
        with model.disabled():
            for batch in batches:
                if batch.choice_ids is None:
                    return
                found.append(model.score(batch).log_softmax(-1))
                if sum(map(len, found)) >= self.examples:
                    break
        rows = torch.cat(found)[: self.examples]
        if rows.shape[1] > MOST_LABELS:
            raise UserError(f"method.name = calibrated: {rows.shape[1]} labels; allowed are up to {MOST_LABELS}")
        # In logarithms throughout: a label that is never likely would have the prior 0 and the score inf.
        self.log_prior.zero_()[: rows.shape[1]] = rows.logsumexp(0) - math.log(len(rows))
        self.labels.fill_(rows.shape[1])

    def adjust_scores(self, scores: Tensor) -> Tensor:
        """(B, C) -> (B, C), in nats.

        Raises:
            UserError: fitted on a task with another number of labels.
        """
        labels = int(self.labels)
        if labels not in (0, scores.shape[1]):
            raise UserError(
                f"method.name = calibrated: its prior is one over {labels} labels, this task has {scores.shape[1]}"
            )
        return scores - self.log_prior[: scores.shape[1]]

    def findings(self) -> list[str]:
        labels = int(self.labels)
        if not labels:
            return ["calibrated: this task has no label scores to calibrate, so it equals zero_shot"]
        shares = ", ".join(f"{p:.3f}" for p in self.log_prior[:labels].exp().tolist())
        return [f"calibrated: label prior {shares}"]


def rewrite(config: InContextConfig, task: Task, seed: int) -> Task:
    """The task with demonstrations before every instruction of every split.

    Each is a training example, instruction + separator + response; every instruction sees the same ones in the
    same order, but never itself. Fewer `shots` are the last ones of more, so those next to the instruction stay.

    Args:
        config: how many, and what joins them.
        task: fingerprint, template hash and notes are kept: data and template are the task's own.
        seed: of the drawing. Classification draws in rounds of one example per label, in random order.
    """
    shown = _draw(task.splits["train"], config.shots, random.Random(seed))
    texts = [(e, e.instruction + task.config.separator + e.response + config.joiner) for e in reversed(shown)]

    def present(example: Example) -> Example:
        before = "".join(text for demonstration, text in texts if demonstration is not example)
        return dataclasses.replace(example, instruction=before + example.instruction)

    return dataclasses.replace(task, splits={name: [present(e) for e in es] for name, es in task.splits.items()})


def _draw(examples: list[Example], count: int, rng: random.Random) -> list[Example]:
    """`count` examples, or all if there are fewer; a smaller count draws the first ones of a larger."""
    piles: dict[int | None, list[Example]] = {}
    for example in examples:
        piles.setdefault(example.label, []).append(example)
    for pile in piles.values():
        rng.shuffle(pile)
    drawn: list[Example] = []
    while len(drawn) < min(count, len(examples)):
        filled = [pile for pile in piles.values() if pile]
        drawn += [pile.pop() for pile in rng.sample(filled, len(filled))]
    return drawn[:count]


def count(config: MethodConfig, backbone: Backbone) -> int:
    """0: nothing is trained."""
    return 0


register("zero_shot", MethodSpec(ZeroShotConfig, lambda config, backbone: Reference(), count))
register("in_context", MethodSpec(InContextConfig, lambda config, backbone: Reference(), count, rewrite))
register("calibrated", MethodSpec(CalibratedConfig, lambda config, backbone: Calibrated(config.examples), count))
