"""DePT: decomposed prompt tuning (Shi & Lipani, ICLR 2024, arXiv 2309.05173).

A long soft prompt's budget, split into a short one and low-rank offsets of the frozen token embeddings:

    [P; E[x] + c (A B)[0 .. n-1]]        P (m, d), A (S, r), B (r, d), c = alpha / sqrt(r)

Row i of A B is added to the instruction's i-th token. A is Kaiming-uniform, B zero, c and the two learning rates, one
for P and one for A and B, are those of the authors' code.

The port: their code adds the offsets to every column of an input padded to S tokens, answer and padding included. Here
a token's index comes from the mask, 0 for the instruction's first token, and only instruction tokens get an offset, in
training as in decoding (I). Tokens behind the first S, `max_offsets`, get none (I).

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from iapt.config.fields import at_least
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.prompt_tuning import PromptTuning, random_tokens
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.edits.word_embeddings import WordEmbeddings
from iapt.nn.offsets import PositionOffsets, offset_parameters


@dataclass
class DeptConfig(SoftPromptConfig):
    """The settings of DePT. `max_offsets` is S, and `learning_rate` is P's. Sizes are the authors' for T5-base at the
    budget of 100 soft tokens.
    """

    learning_rate: float = at_least(3e-2, 0)
    num_soft_tokens: int = at_least(40, 1)
    rank: int = at_least(45, 1)
    max_offsets: int = at_least(256, 1)
    alpha: float = at_least(8.0, 0)
    offset_learning_rate: float = at_least(1e-3, 0)

    def problems(self) -> list[str]:
        return [] if self.alpha > 0 else [f"method.alpha = {self.alpha}: must be above 0, it multiplies the offsets"]

    def size_knob(self) -> SizeKnob:
        return SizeKnob("rank")


class Dept(PromptTuning):
    """P (m, d) in float32, given as input embeddings, and the offsets."""

    def __init__(self, config: DeptConfig, start: Tensor) -> None:
        super().__init__(start, "before_instruction")
        width = start.shape[1]
        self.offsets = PositionOffsets(config.max_offsets, width, config.rank, config.alpha)
        self.lr_overrides = {"offsets.": config.offset_learning_rate}

    def edits(self) -> Sequence[Edit]:
        return (WordEmbeddings(self),)

    def edit_embeddings(self, words: Tensor, mask: Tensor) -> Tensor:
        return words + self.offsets(mask)


def build(config: DeptConfig, backbone: Backbone) -> Dept:
    """The method at its start: P from embeddings of random tokens (I), offsets of zero."""
    return Dept(config, random_tokens(config.num_soft_tokens, backbone))


def count(config: DeptConfig, backbone: Backbone) -> int:
    """m d + r (S + d)."""
    d = backbone.embedding_size
    return config.num_soft_tokens * d + offset_parameters(config.max_offsets, d, config.rank)


register("dept", MethodSpec(DeptConfig, build, count))
