"""IAPT: instance-aware prompt tuning (Zhu et al., ACL 2024, arXiv 2405.18203).

At every layer a small generator reads the instruction's hidden states and writes that layer's soft tokens
(labels: A abstract, B a third party's summary, S a sibling paper, I inferred):

    Z = h W_down                              down-projection, no bias                    (B)
    A = softmax_n(Z W_sa),  Q = A^T Z         self-attention pooling, one query a token   (S)
    Q' = g(Q)                                 rational activation, learned per layer      (A)
    P = Q' W_up                               up-projection; P replaces the soft tokens   (I)

Where the tokens sit is not known; `position` offers both, and the paper's layout is taken to be LPT's and deep
prompt tuning's, `before_instruction` (I). The paper shares projections across layers in a form that is not known (B);
`share_every: k` lets k neighbouring layers share W_down, W_sa and W_up, never the activation (A).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iapt.methods import MethodConfig, MethodSpec, SoftPrompt, register
from iapt.nn.pooling import self_attention_pool
from iapt.nn.rational import GELU_FITS, Rational

if TYPE_CHECKING:
    from iapt.backbone import Backbone


@dataclass
class IaptConfig(MethodConfig):
    """`bottleneck` is r, the budget knob (A: 4 soft tokens; S: r = 320 on LLaMA-2 7B at the 80M budget)."""

    num_soft_tokens: int = field(default=4, metadata={"minimum": 1})
    bottleneck: int = field(default=64, metadata={"minimum": 1})
    position: str = field(
        default="before_instruction", metadata={"choices": ("before_instruction", "after_instruction")}
    )
    share_every: int = field(default=1, metadata={"minimum": 1})
    numerator_degree: int = 6
    denominator_degree: int = 5
    # Residual streams carry outlier channels that would own the pooling and blow up x^6.
    normalize_input: bool = True
    output_std: float = field(default=0.02, metadata={"minimum": 0})  # of W_up's normal start
    # The coefficients' gradients grow like x^j: at the generator's rate a_6 would leave the useful range in one step.
    activation_learning_rate: float = field(default=1e-4, metadata={"minimum": 0})

    @property
    def degrees(self) -> tuple[int, int]:
        return self.numerator_degree, self.denominator_degree

    def problems(self) -> list[str]:
        if self.degrees not in GELU_FITS:
            known = ", ".join(f"{m}/{n}" for m, n in GELU_FITS)
            return [f"method.numerator_degree/denominator_degree = {self.degrees}: allowed are {known}"]
        return []


class Generator(nn.Module):
    """The projections of one block of layers: W_down (d, r), W_sa (r, s), W_up (r, d)."""

    def __init__(self, width: int, bottleneck: int, num_soft_tokens: int, output_std: float) -> None:
        super().__init__()
        # On inputs of unit RMS, 1/sqrt(fan-in) keeps Z at unit scale, the range where g is close to GELU.
        self.down = nn.Parameter(torch.randn(width, bottleneck) * width**-0.5)
        self.queries = nn.Parameter(torch.randn(bottleneck, num_soft_tokens) * bottleneck**-0.5)
        self.up = nn.Parameter(torch.randn(bottleneck, width) * output_std)

    def forward(self, states: Tensor, mask: Tensor, activation: nn.Module) -> Tensor:
        """States (B, N, d), mask (B, N) bool -> soft tokens (B, s, d)."""
        pooled = self_attention_pool(states @ self.down, self.queries, mask)
        return activation(pooled) @ self.up


class Iapt(SoftPrompt):
    """One generator a block of layers, one activation a layer."""

    def __init__(self, config: IaptConfig, num_layers: int, width: int) -> None:
        super().__init__()
        self.num_soft_tokens = config.num_soft_tokens
        self.position = config.position
        self.share_every = config.share_every
        self.normalize_input = config.normalize_input
        self.generators = nn.ModuleList(
            Generator(width, config.bottleneck, config.num_soft_tokens, config.output_std)
            for _ in range(0, num_layers, config.share_every)
        )
        self.activations = nn.ModuleList(Rational(config.degrees) for _ in range(num_layers))
        self.own_rates = {"activations.": config.activation_learning_rate}

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor:
        generator = self.generators[layer // self.share_every]
        assert isinstance(generator, Generator)
        states = states.to(torch.promote_types(states.dtype, generator.down.dtype))
        if self.normalize_input:
            states = F.rms_norm(states, states.shape[-1:], eps=1e-6)
        return generator(states, mask, self.activations[layer])


def build(config: IaptConfig, backbone: Backbone) -> Iapt:
    """The method at its start."""
    return Iapt(config, backbone.num_layers, backbone.hidden_size)


def count(config: IaptConfig, backbone: Backbone) -> int:
    """ceil(L / k) (2 d r + r s) + L (m + 1 + n)."""
    blocks = -(-backbone.num_layers // config.share_every)
    projections = config.bottleneck * (2 * backbone.hidden_size + config.num_soft_tokens)
    return blocks * projections + backbone.num_layers * (sum(config.degrees) + 1)


register("iapt", MethodSpec(IaptConfig, build, count))
