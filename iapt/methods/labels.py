"""What methods share that score the labels of a task in a way of their own and train on these scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from iapt.config.errors import UserError
from iapt.config.fields import at_least, choice
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.config.task import TaskConfig
from iapt.data.batch import Batch
from iapt.methods.prompt_tuning import PromptTuningConfig, draw_start
from iapt.model.backbone import Backbone


@dataclass
class LabelPromptConfig(SoftPromptConfig):
    """The settings of a method that scores labels. `label_words` are the task's, in the task's order; the soft tokens
    start from their embeddings.
    """

    bound_to_task: ClassVar[bool] = True

    label_words: list[str] = field(default_factory=list)
    num_soft_tokens: int = at_least(20, 1)
    position: str = choice("before_instruction", "before_instruction", "after_instruction")

    def problems_with(self, task: TaskConfig) -> list[str]:
        if not task.label_column:
            return [
                f"method.name = {self.name}: scores labels, but task {task.name} has none (task.label_column = null)"
            ]
        found = []
        if task.options_column:
            found.append(
                f"task.options_column = {task.options_column}: method {self.name} knows one set of labels for all, "
                "not options of each row's own; allowed is null"
            )
        if task.scoring != "likelihood":
            found.append(f"task.scoring = {task.scoring}: method {self.name} trains scores; allowed is likelihood")
        if task.normalize_scores:
            found.append(f"task.normalize_scores = true: method {self.name}'s scores have no length; allowed is false")
        if self.label_words != task.label_words:
            found.append(f"method.label_words = {self.label_words}: must be the task's, {task.label_words}")
        return found

    def size_knob(self) -> SizeKnob:
        return SizeKnob("num_soft_tokens")


def start_of(config: LabelPromptConfig, backbone: Backbone) -> Tensor:
    """(s, d): the embeddings of the label words' tokens, repeated or cut to s. Raises UserError if there are none."""
    text = " ".join(config.label_words)
    if not text:
        raise UserError("method.label_words = []: a method that scores labels needs their words")
    return draw_start(PromptTuningConfig(num_soft_tokens=config.num_soft_tokens, init="text", init_text=text), backbone)


def label_loss(scores: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the right labels, in nats, a row counted once for each token of its response: a scalar.

    Args:
        scores: (B, C), one for each label.
        batch: with labels.

    Raises:
        ValueError: if the batch does not know its labels.
    """
    if batch.labels is None:
        raise ValueError("this method trains on labels: the batch needs them, responses that are among its choices")
    losses = F.cross_entropy(scores, batch.labels, reduction="none")
    return (losses * batch.response_mask.sum(1)).sum()
