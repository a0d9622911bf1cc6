"""LoPA: low-rank prompt adaptation (Jain et al., NeurIPS 2024, arXiv 2405.15282), on the backbone's own encoding.

A task's soft tokens, each entry gated by a low-rank matrix that is generated from the instruction (section 3):

    P(x) = P_task * sigmoid(U V^T)        U (s, r), V (d, r) from e(x) by a head each: linear, tanh, linear

The authors take e(x) from a small code encoder; here it is the frozen backbone's last hidden state of the
instruction, from a pass of its own (I). P enters at the input and its states run on as tokens' do.

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.config.fields import at_least, choice
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.prompt_tuning import random_tokens
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.edits.layer_input import LayerInput
from iapt.model.method import SoftPrompt


@dataclass
class LopaConfig(SoftPromptConfig):
    """The settings of LoPA. `rank` is r. `head_width` is the heads' inner width; null stands for the backbone's, as
    the authors take their encoder's.
    """

    learning_rate: float = at_least(3e-3, 0)
    num_soft_tokens: int = at_least(10, 1)
    position: str = choice("before_instruction", "before_instruction", "after_instruction")
    rank: int = at_least(4, 1)
    head_width: int | None = at_least(None, 1)
    dropout: float = at_least(0.1, 0)

    def problems(self) -> list[str]:
        return [] if self.dropout < 1 else [f"method.dropout = {self.dropout}: must be below 1"]

    def size_knob(self) -> SizeKnob:
        return SizeKnob("head_width")


class Lopa(SoftPrompt):
    """The method's module: `task` (s, d) in float32, and the heads that make U and V."""

    def __init__(self, config: LopaConfig, task: Tensor) -> None:
        super().__init__()
        (self.num_soft_tokens, d), self.position = task.shape, config.position
        width = config.head_width or d
        self.task = nn.Parameter(task.float())
        self.left, self.right = (
            nn.Sequential(
                nn.Linear(d, width), nn.Tanh(), nn.Dropout(config.dropout), nn.Linear(width, rows * config.rank)
            )
            for rows in (self.num_soft_tokens, d)
        )

    def edits(self) -> Sequence[Edit]:
        return (LayerInput(self, reads="encoding"),)

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor | None:
        if layer > 0:
            return None
        # Padding is on the left: the last column is the last token.
        summary = states[:, -1].to(torch.promote_types(states.dtype, self.task.dtype))
        u = self.left(summary).unflatten(-1, (self.num_soft_tokens, -1))
        v = self.right(summary).unflatten(-1, (self.task.shape[1], -1))
        return previous + self.task * (u @ v.transpose(1, 2)).sigmoid()


def build(config: LopaConfig, backbone: Backbone) -> Lopa:
    """The method at its start: P_task from embeddings of random tokens, torch's defaults for the heads.

    Raises:
        UserError: if embeddings are not as wide as layers.
    """
    if backbone.embedding_size != backbone.hidden_size:
        raise UserError(
            f"method: Lopa starts layers from token embeddings, and in {type(backbone.lm).__name__} these are "
            f"{backbone.embedding_size} wide, layers {backbone.hidden_size}; method=prompt_tuning can do with that"
        )
    return Lopa(config, random_tokens(config.num_soft_tokens, backbone))


def count(config: LopaConfig, backbone: Backbone) -> int:
    """s d + 2 w (d + 1) + r (s + d) (w + 1), w the heads' inner width."""
    d, s = backbone.hidden_size, config.num_soft_tokens
    width = config.head_width or d
    return s * d + 2 * width * (d + 1) + config.rank * (s + d) * (width + 1)


register("lopa", MethodSpec(LopaConfig, build, count))
