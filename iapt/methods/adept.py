"""ADePT: adaptive decomposed prompt tuning (Tang et al., ICLR 2025).

A short soft prompt, and offsets of the frozen token embeddings that depend on the token instead of its position:

    [P; E[x] + relu(E[x] A + a) B + b]        P (m, d), A (d, r), B (r, d), dropout on the relu's output

B, a and b start at zero, so every offset does. P has a learning rate of its own, as in the authors' code.

The port: an encoder edits all of its input; here the instruction's tokens are edited, the response's are not, in
training as in decoding (I). A starts as torch's linear maps do, Kaiming-uniform within 1 / sqrt(d) (I).

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iapt.config.fields import at_least
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.prompt_tuning import PromptTuning, random_tokens
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.edits.word_embeddings import WordEmbeddings


@dataclass
class AdeptConfig(SoftPromptConfig):
    """The settings of ADePT. `bottleneck` is r, and `learning_rate` is P's. Sizes are the authors' for T5-base at the
    budget of 100 soft tokens.
    """

    learning_rate: float = at_least(3e-2, 0)
    num_soft_tokens: int = at_least(60, 1)
    bottleneck: int = at_least(19, 1)
    dropout: float = at_least(0.1, 0)
    offset_learning_rate: float = at_least(1e-3, 0)

    def problems(self) -> list[str]:
        return [] if self.dropout < 1 else [f"method.dropout = {self.dropout}: must be below 1"]

    def size_knob(self) -> SizeKnob:
        return SizeKnob("bottleneck")


class Adept(PromptTuning):
    """P (m, d) in float32, given as input embeddings, and the network of the offsets."""

    def __init__(self, config: AdeptConfig, start: Tensor) -> None:
        super().__init__(start, "before_instruction")
        width = start.shape[1]
        down, up = nn.Linear(width, config.bottleneck), nn.Linear(config.bottleneck, width)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.offsets = nn.Sequential(down, nn.ReLU(), nn.Dropout(config.dropout), up)
        self.lr_overrides = {"offsets.": config.offset_learning_rate}

    def edits(self) -> Sequence[Edit]:
        return (WordEmbeddings(self),)

    def edit_embeddings(self, words: Tensor, mask: Tensor) -> Tensor:
        words = words.to(torch.promote_types(words.dtype, self.prompt.dtype))
        return words + self.offsets(words)


def build(config: AdeptConfig, backbone: Backbone) -> Adept:
    """The method at its start: P from embeddings of random tokens (I), offsets of zero."""
    return Adept(config, random_tokens(config.num_soft_tokens, backbone))


def count(config: AdeptConfig, backbone: Backbone) -> int:
    """m d + 2 d r + r + d."""
    d, r = backbone.embedding_size, config.bottleneck
    return config.num_soft_tokens * d + 2 * d * r + r + d


register("adept", MethodSpec(AdeptConfig, build, count))
