"""PARA: prompt-aware representation adjustment (Liu et al., EMNLP 2024, arXiv 2502.01033).

No soft tokens: at every layer a small generator reads the instruction's hidden states and writes vectors that multiply
queries, values and the feed-forward's inner (Up) activations, in every column of the row, the response's too. The
abstract and a third party's summary (B) name the generator's parts, pooler, down-projection, activation, up-projection,
and what is scaled; all else is inferred (I), after IAPT, whose authors' group it comes from:

    Z = h W_down                              down-projection, no bias; ahead of the pooler, as in IAPT     (I)
    q = softmax_n(Z w_sa)^T Z                 self-attention pooling with one query                         (I)
    [l_Q, l_V, l_U] = 1 + g(q) W_up           W_up starts at zero: training starts at the bare backbone     (I)
    Q' = l_Q * Q,  V' = l_V * V,  U' = l_U * U                                                              (B)

The size is not: r = 12 without biases has 8.9M parameters on LLaMA-2 7B, which is the number that the summary gives.
Queries are scaled before any rotation or norm of theirs, and where a feed-forward has no gate, U is what its activation
function is applied to (I). Whether the paper learns g is not known; here it is IAPT's rational activation, trained
bi-level, or a fixed function.

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iapt.config.fields import at_least, choice
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.registry import MethodSpec, register
from iapt.model.architecture import part_of
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.edits.output_scale import OutputScale
from iapt.model.method import BiLevel, SoftPrompt
from iapt.nn.norm import cast_and_normalize
from iapt.nn.pooling import self_attention_pool
from iapt.nn.rational import FUNCTIONS, Rational

PARTS = ("query", "value", "inner")


@dataclass
class ParaConfig(SoftPromptConfig):
    """The generator.

    Attributes:
        bottleneck: r, the budget knob.
        activation: `rational`, learned per layer from GELU on (m = 6, n = 5), or a fixed function.
        activation_training: of the rational coefficients. `strict`: bi-level, their batches are carved from train.
            `joint`: with everything else, on the same batches. `frozen`: not at all.
        held_out_share: of train, with `strict`.
        activation_learning_rate: of the coefficients, as IAPT has it.
    """

    learning_rate: float = at_least(3e-3, 0)
    bottleneck: int = at_least(12, 1)
    activation: str = choice("rational", "rational", *FUNCTIONS)
    activation_training: str = choice("strict", "strict", "joint", "frozen")
    held_out_share: float = at_least(0.1, 0)
    activation_learning_rate: float = at_least(1e-6, 0)
    # Residual streams carry outlier channels that would own the pooling and blow up x^6.
    normalize_input: bool = True

    def problems(self) -> list[str]:
        if not 0 < self.held_out_share < 1:
            return [f"method.held_out_share = {self.held_out_share}: must be above 0 and below 1"]
        return []

    def size_knob(self) -> SizeKnob:
        return SizeKnob("bottleneck")


class Generator(nn.Module):
    """One layer's W_down (d, r), w_sa (r, 1) and W_up (r, the widths of Q, V and U side by side)."""

    def __init__(self, width: int, bottleneck: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.outputs = list(outputs)
        # On inputs of unit RMS, 1/sqrt(fan-in) keeps Z at unit scale, the range where g is close to its start.
        self.down = nn.Parameter(torch.randn(width, bottleneck) * width**-0.5)
        self.query = nn.Parameter(torch.randn(bottleneck, 1) * bottleneck**-0.5)
        self.up = nn.Parameter(torch.zeros(bottleneck, sum(outputs)))

    def forward(self, states: Tensor, mask: Tensor, activation: nn.Module) -> tuple[Tensor, ...]:
        """States (B, N, d), mask (B, N) bool -> vectors (B, width), one for each of the widths."""
        pooled = self_attention_pool(states @ self.down, self.query, mask).squeeze(1)
        return (1 + activation(pooled) @ self.up).split(self.outputs, dim=-1)


class Para(SoftPrompt):
    """One generator and one activation a layer, and no soft columns."""

    num_soft_tokens = 0
    position = "before_instruction"

    def __init__(self, config: ParaConfig, width: int, outputs: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.normalize_input = config.normalize_input
        self.generators = nn.ModuleList(Generator(width, config.bottleneck, widths) for widths in outputs)
        self.activations = nn.ModuleList(
            Rational() if config.activation == "rational" else FUNCTIONS[config.activation]() for _ in outputs
        )
        self.lr_overrides = {"activations.": config.activation_learning_rate}
        if config.activation_training == "frozen":
            self.activations.requires_grad_(False)
        elif config.activation_training == "strict" and config.activation == "rational":
            self.bilevel = BiLevel("activations.", share=config.held_out_share)

    def edits(self) -> Sequence[Edit]:
        return (OutputScale(self, PARTS),)

    def scale(self, layer: int, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        generator = self.generators[layer]
        assert isinstance(generator, Generator)
        states = cast_and_normalize(states, generator.down, self.normalize_input)
        return dict(zip(PARTS, generator(states, mask, self.activations[layer]), strict=True))

    def observed(self) -> Sequence[nn.Module]:
        return list(self.activations)


def widths(backbone: Backbone) -> list[list[int]]:
    """Every layer's widths of Q, V and U. Raises ValueError for a decoder whose parts go by unknown names."""
    return [[part_of(layer, part)[2] for part in PARTS] for layer in backbone.layers]


def build(config: ParaConfig, backbone: Backbone) -> Para:
    """The method at its start, where it changes nothing."""
    return Para(config, backbone.hidden_size, widths(backbone))


def count(config: ParaConfig, backbone: Backbone) -> int:
    """r (d + 1 + d_Q + d_V + d_U) over the layers, and m + 1 + n = 12 a layer for learned rational activations."""
    outputs, d = widths(backbone), backbone.hidden_size
    learned = len(outputs) if config.activation == "rational" and config.activation_training != "frozen" else 0
    return sum(config.bottleneck * (d + 1 + sum(one)) for one in outputs) + learned * 12


register("para", MethodSpec(ParaConfig, build, count))
