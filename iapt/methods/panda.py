"""PANDA: prompt transfer by knowledge distillation (Zhong et al., TKDE 2024, arXiv 2208.10160).

A source task's prompt is the frozen teacher of a prompt for the target task. With z_S and z_T the logits of one
backbone under the student's and the teacher's prompt, training minimises

    CE(z_S, y) + lambda * MSE(z_S, z_T)        lambda = weight * transferability * schedule

The loss, and a transferability that is the cosine of two task embeddings, are the paper's; its code adds the schedule.
Ours are (R), reconstructed for a decoder, or (I):

    the MSE is the mean over the vocabulary at each response position; positions count as in the cross-entropy (R)
    the task embedding of a prompt is the mean of its soft tokens, as SPoT has it (Vu et al., ACL 2022); the target's is
    the student's at that very step, without gradient, and a cosine below 0 counts as 0 (R)
    the teacher is the source prompt as it is; the paper's has been trained on the target task first: give `init_from` a
    prompt_tuning run on the target task that itself started from the source (I)

The dev loss, which picks the checkpoint, is the cross-entropy alone (I). The teacher is saved with the adapter, so that
nothing else is needed to load it; afterwards it takes no part.

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iapt.config.fields import at_least, choice
from iapt.data.batch import Batch
from iapt.methods.prompt_tuning import PromptTuning, PromptTuningConfig, count, draw_start
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.method import Passes


@dataclass
class PandaConfig(PromptTuningConfig):
    """`init_from` names the teacher: a prompt_tuning or panda adapter of this backbone and size. The student starts
    `fresh`, as `init` says, or at the `source` prompt. `adaptive` false: lambda does without the transferability.
    `schedule` warmup_decay: a rise over the first `warmup_ratio` of the steps, then a fall to 0, both linear."""

    learning_rate: float = at_least(3e-2, 0)
    student_start: str = choice("fresh", "fresh", "source")
    weight: float = at_least(0.01, 0)
    adaptive: bool = True
    schedule: str = choice("constant", "constant", "warmup_decay")
    warmup_ratio: float = at_least(0.1, 0)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.init_from is None:
            found.append("method.init_from = null: panda learns from another task's prompt; give a prompt_tuning run")
        if self.warmup_ratio > 1:
            found.append(f"method.warmup_ratio = {self.warmup_ratio}: a share of all steps, 0 to 1")
        return found


class Panda(PromptTuning):
    """The student, a `PromptTuning`, and `teacher` (s, d) float32, a buffer."""

    has_objective = True

    starts_from = ("prompt_tuning",)

    def __init__(self, config: PandaConfig, student: Tensor, teacher: Tensor) -> None:
        super().__init__(student, config.position)
        self.register_buffer("teacher", teacher.float())
        self.teacher: Tensor
        self.config = config
        self._teaching = False
        self._step = 0
        self._total: int | None = None

    def adopt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        source = tensors["prompt"]
        return {"teacher": source, "prompt": source if self.config.student_start == "source" else self.prompt.detach()}

    def on_train_start(self, total_steps: int) -> None:
        self._step, self._total = 0, total_steps

    def after_step(self, step: int) -> None:
        self._step = step

    def training_state(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]

    def input_embeddings(self) -> Tensor:
        return self.teacher if self._teaching else self.prompt

    def transferability(self) -> Tensor:
        """A scalar in [0, 1]: how like the teacher's task the student's looks by now, without gradient."""
        return F.cosine_similarity(self.prompt.detach().mean(0), self.teacher.mean(0), dim=0).clamp(min=0)

    def distillation_weight(self) -> Tensor:
        """Lambda of the step to come, a scalar."""
        similar = self.transferability() if self.config.adaptive else torch.ones_like(self.teacher[0, 0])
        return self.config.weight * self._scheduled() * similar

    def _scheduled(self) -> float:
        if self.config.schedule == "constant" or self._total is None:
            return 1.0
        warmup = math.ceil(self.config.warmup_ratio * self._total)
        if self._step < warmup:
            return (self._step + 1) / warmup
        return (self._total - self._step) / max(self._total - warmup, 1)

    def objective(self, model: Passes, batch: Batch) -> Tensor | None:
        """CE + lambda MSE while training, the cross-entropy otherwise."""
        if not self.training:
            return None
        from iapt.model.adapted import cross_entropy

        # The pass that carries gradient comes last: activation checkpointing repeats the last one.
        self._teaching = True
        try:
            with torch.no_grad():
                wanted = model.response_logits(batch).float()
        finally:
            self._teaching = False
        logits = model.response_logits(batch)
        apart = ((logits.float() - wanted) ** 2).mean(-1)
        return cross_entropy(logits, batch) + self.distillation_weight() * (apart * batch.response_mask).sum()


def build(config: PandaConfig, backbone: Backbone) -> Panda:
    """The student at its start; until `adopt` gives it a teacher that one is random.

    Raises UserError if `init_text` has no tokens.
    """
    student = draw_start(config, backbone)
    return Panda(config, student, torch.randn_like(student) * config.init_std)


register("panda", MethodSpec(PandaConfig, build, count))
