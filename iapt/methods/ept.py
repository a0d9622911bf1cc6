"""EPT: efficient prompt tuning by multi-space projection and prompt fusion (Lan et al., AAAI 2025, arXiv 2405.11464).

A reconstruction (R): the authors released no code, and only the abstract was at hand. It says (A) that a soft prompt is
decomposed into a shorter one and two low-rank matrices, that these enrich the short prompt (*fusion*), and that the
prompt is projected into several subspaces whose weights a gating network learns (*projection*):

    O = c A B                                            the offsets of DePT, iapt/methods/dept.py       (A)
    F = P + softmax(P W_q (O W_k)^T / sqrt(a)) O W_v     each soft token attends to the offsets          (R)
    Q = F + sum_k g_k(F) f_k(F)                          g a softmax over K spaces, f_k a bottleneck     (R)
    [Q; E[x] + O[0 .. n-1]]                              as DePT: by position, instruction tokens alone  (A, R)

    f_k(x) = relu(x D_k + e_k) U_k + u_k,    g(x) = softmax(x G + h)

Square maps would be nearly all of the method on a 7B model, so W_q and W_k are (d, a), W_v is a product (d, a)(a, d),
and f_k goes through `projection_width` (R). P and F are brought to unit RMS before W_q, G and D_k read them, since
embeddings differ in scale between backbones by orders of magnitude (R). B, U_k and u_k start at zero, so the method
starts as prompt tuning does, with P from embeddings of random tokens (R). B and U_k move in the first step, whatever
reads their products in the next ones. P has a learning rate of its own, as in DePT (R).

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

import math
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
from iapt.nn.norm import unit_rms
from iapt.nn.offsets import PositionOffsets, offset_parameters


@dataclass
class EptConfig(SoftPromptConfig):
    """The settings of EPT. `max_offsets`, `rank` and `alpha` are those of DePT, `attention_width` is a, `num_spaces`
    is K, and `learning_rate` is P's.
    """

    learning_rate: float = at_least(3e-2, 0)
    num_soft_tokens: int = at_least(40, 1)
    rank: int = at_least(45, 1)
    max_offsets: int = at_least(256, 1)
    alpha: float = at_least(8.0, 0)
    attention_width: int = at_least(16, 1)
    num_spaces: int = at_least(4, 2)
    projection_width: int = at_least(16, 1)
    network_learning_rate: float = at_least(5e-3, 0)

    def problems(self) -> list[str]:
        return [] if self.alpha > 0 else [f"method.alpha = {self.alpha}: must be above 0, it multiplies the offsets"]

    def size_knob(self) -> SizeKnob:
        return SizeKnob("projection_width")


class Fusion(nn.Module):
    """Soft tokens attend to offsets: `query`, `key` (d, a), `value` (d, a)(a, d), none with a bias."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.value = nn.Sequential(nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False))

    def forward(self, prompt: Tensor, offsets: Tensor) -> Tensor:
        """Prompt (m, d), offsets (S, d) -> (m, d)."""
        query, key = self.query(unit_rms(prompt)), self.key(offsets)
        return (query @ key.T / math.sqrt(key.shape[-1])).softmax(-1) @ self.value(offsets)


class Projection(nn.Module):
    """K bottlenecks, `spaces`, summed by the weights of `gate`."""

    def __init__(self, width: int, inner: int, spaces: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, spaces)
        self.spaces = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)) for _ in range(spaces)
        )
        for name, parameter in self.spaces.named_parameters():
            if ".2." in name:  # U_k and u_k
                nn.init.zeros_(parameter)

    def forward(self, prompt: Tensor) -> Tensor:
        """(m, d) -> (m, d)."""
        prompt = unit_rms(prompt)
        weights = self.gate(prompt).softmax(-1).unsqueeze(-1)
        return (weights * torch.stack([space(prompt) for space in self.spaces], 1)).sum(1)


class Ept(PromptTuning):
    """P (m, d) in float32, the offsets, and the networks that make soft tokens of the two."""

    def __init__(self, config: EptConfig, start: Tensor) -> None:
        super().__init__(start, "before_instruction")
        width = start.shape[1]
        self.offsets = PositionOffsets(config.max_offsets, width, config.rank, config.alpha)
        self.fusion = Fusion(width, config.attention_width)
        self.projection = Projection(width, config.projection_width, config.num_spaces)
        self.lr_overrides = dict.fromkeys(("offsets.", "fusion.", "projection."), config.network_learning_rate)

    def input_embeddings(self) -> Tensor:
        fused = self.prompt + self.fusion(self.prompt, self.offsets.table())
        return fused + self.projection(fused)

    def edits(self) -> Sequence[Edit]:
        return (WordEmbeddings(self),)

    def edit_embeddings(self, words: Tensor, mask: Tensor) -> Tensor:
        return words + self.offsets(mask)


def build(config: EptConfig, backbone: Backbone) -> Ept:
    """The method at its start."""
    return Ept(config, random_tokens(config.num_soft_tokens, backbone))


def count(config: EptConfig, backbone: Backbone) -> int:
    """m d + r (S + d) + 4 d a + K (2 d p + p + d) + K (d + 1), p the projections' inner width."""
    d, p = backbone.embedding_size, config.projection_width
    decomposed = config.num_soft_tokens * d + offset_parameters(config.max_offsets, d, config.rank)
    return decomposed + 4 * d * config.attention_width + config.num_spaces * (2 * d * p + p + 2 * d + 1)


register("ept", MethodSpec(EptConfig, build, count))
