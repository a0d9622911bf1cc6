"""IAPT: instruction-aware prompt tuning (Zhu et al., ACL 2024, arXiv 2405.18203; "instance-aware" in ACL's title).

At every layer a small generator reads the instruction's hidden states and writes that layer's soft tokens:

    Z = h W_down                              down-projection, no bias                    (B)
    A = softmax_n(Z W_sa),  Q = A^T Z         self-attention pooling, one query a token   (S)
    Q' = g(Q)                                 rational activation, learned per layer      (A)
    P = Q' W_up                               up-projection; P replaces the soft tokens   (I)

Where the tokens sit is not known. `position` offers both: LPT and deep prompt tuning put them `before_instruction`,
and the paper's layout is taken to be theirs (I); `after_instruction` scored higher where a difference could be measured
and trains at a fraction of the cost, so it is the default (docs/iapt_defaults.md). The paper shares projections across
layers in a form that is not known (B); `share_every: k` lets k neighbouring layers share W_down, W_sa and W_up, never
the activation (A).

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
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.edits.keys_values import KeysValues
from iapt.model.edits.layer_input import LayerInput
from iapt.model.method import BiLevel, SoftPrompt
from iapt.nn.norm import cast_and_normalize
from iapt.nn.pooling import last_tokens, segment_pool, self_attention_pool
from iapt.nn.rational import FITS, FUNCTIONS, Rational

ACTIVATIONS = ("rational", "relu", "gelu", "silu", "tanh", "identity")


@dataclass
class IaptConfig(SoftPromptConfig):
    """The generator, and the switches of the paper's ablations.

    Attributes:
        num_soft_tokens: s (A: 4).
        bottleneck: r, the budget knob (S: 320 on LLaMA-2 7B at the 80M budget).
        pooling: how the bottleneck states of n tokens become s. `self_attention` is the method's (S). `mean` and `max`
            pool s contiguous segments of equal length, `last` takes the last s tokens: ablations (S), whose way from
            one vector to s tokens is not known (I).
        activation: `rational` is the method's (A), a fixed function the ablation (S).
        upper_activation: of the layers l >= L / 2, null for the same as below. The pilot study (S) has ReLU in the
            lower half and GELU in the upper one, and the reverse.
        rational_start: the function that a rational activation starts as (S: GELU).
        activation_training: of the rational coefficients. `strict`: bi-level, their batches are carved from train.
            `paper`: bi-level on dev (S), which then also selects the checkpoint. `joint`: with everything else, on the
            same batches. `frozen`: not at all.
        held_out_share: of train, with `strict`.
        output_start: `normal` draws W_up. `gated` also multiplies the values of layer l's soft tokens by tanh(g_l),
            g_l starting at 0 (after LLaMA-Adapter; I). Values, because a norm ahead of the attention divides any
            scale of P itself out again. No no-op even so: the keys still take their share of the attention.
    """

    learning_rate: float = at_least(3e-3, 0)
    num_soft_tokens: int = at_least(4, 1)
    bottleneck: int = at_least(64, 1)
    position: str = choice("after_instruction", "before_instruction", "after_instruction")
    share_every: int = at_least(1, 1)
    pooling: str = choice("self_attention", "self_attention", "mean", "max", "last")
    activation: str = choice("rational", *ACTIVATIONS)
    upper_activation: str | None = None
    rational_start: str = choice("gelu", *FUNCTIONS)
    numerator_degree: int = 6
    denominator_degree: int = 5
    activation_training: str = choice("strict", "strict", "paper", "joint", "frozen")
    held_out_share: float = at_least(0.1, 0)
    # The source's value (S). Gradients grow like x^j: at the generator's rate a_6 would leave the useful range at once.
    activation_learning_rate: float = at_least(1e-6, 0)
    # Residual streams carry outlier channels that would own the pooling and blow up x^6.
    normalize_input: bool = True
    output_start: str = choice("normal", "normal", "gated")
    output_std: float = at_least(0.02, 0)  # of W_up's normal start

    @property
    def degrees(self) -> tuple[int, int]:
        return self.numerator_degree, self.denominator_degree

    def activations(self, num_layers: int) -> list[str]:
        """The activation of every layer."""
        upper = self.upper_activation or self.activation
        return [self.activation if 2 * layer < num_layers else upper for layer in range(num_layers)]

    def problems(self) -> list[str]:
        found, known = [], sorted({degrees for _, degrees in FITS}, reverse=True)
        if self.degrees not in known:
            found.append(
                f"method.numerator_degree/denominator_degree = {self.numerator_degree}/{self.denominator_degree}: "
                f"allowed are {', '.join(f'{m}/{n}' for m, n in known)}"
            )
        if self.upper_activation not in (None, *ACTIVATIONS):
            found.append(
                f"method.upper_activation = {self.upper_activation}: allowed are null, {', '.join(ACTIVATIONS)}"
            )
        if not 0 < self.held_out_share < 1:
            found.append(f"method.held_out_share = {self.held_out_share}: must be above 0 and below 1")
        return found

    def size_knob(self) -> SizeKnob:
        return SizeKnob("bottleneck")


class Generator(nn.Module):
    """The projections of one block of layers: W_down (d, r), W_up (r, d), and W_sa (r, s) if it pools by attention."""

    def __init__(self, config: IaptConfig, width: int) -> None:
        super().__init__()
        self.pooling, self.num_soft_tokens = config.pooling, config.num_soft_tokens
        bottleneck = config.bottleneck
        # On inputs of unit RMS, 1/sqrt(fan-in) keeps Z at unit scale, the range where g is close to its start.
        self.down = nn.Parameter(torch.randn(width, bottleneck) * width**-0.5)
        if config.pooling == "self_attention":
            self.queries = nn.Parameter(torch.randn(bottleneck, config.num_soft_tokens) * bottleneck**-0.5)
        self.up = nn.Parameter(torch.randn(bottleneck, width) * config.output_std)

    def forward(self, states: Tensor, mask: Tensor, activation: nn.Module) -> Tensor:
        """States (B, N, d), mask (B, N) bool -> soft tokens (B, s, d)."""
        return activation(self._pool(states @ self.down, mask)) @ self.up

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "self_attention":
            return self_attention_pool(states, self.queries, mask)
        if self.pooling == "last":
            return last_tokens(states, mask, self.num_soft_tokens)
        return segment_pool(states, mask, self.num_soft_tokens, self.pooling)


class Iapt(SoftPrompt):
    """One generator a block of layers, one activation a layer."""

    def __init__(self, config: IaptConfig, num_layers: int, width: int) -> None:
        super().__init__()
        self.num_soft_tokens = config.num_soft_tokens
        self.position = config.position
        self.share_every = config.share_every
        self.normalize_input = config.normalize_input
        self.generators = nn.ModuleList(Generator(config, width) for _ in range(0, num_layers, config.share_every))
        self.activations = nn.ModuleList(
            Rational(config.degrees, config.rational_start) if name == "rational" else FUNCTIONS[name]()
            for name in config.activations(num_layers)
        )
        self.gates = nn.Parameter(torch.zeros(num_layers)) if config.output_start == "gated" else None
        self.lr_overrides = {"activations.": config.activation_learning_rate}
        if config.activation_training == "frozen":
            self.activations.requires_grad_(False)
        elif config.activation_training != "joint" and any(True for _ in self.activations.parameters()):
            source = "dev" if config.activation_training == "paper" else "train"
            self.bilevel = BiLevel("activations.", source, config.held_out_share)

    def edits(self) -> Sequence[Edit]:
        return (LayerInput(self),) if self.gates is None else (LayerInput(self), KeysValues(self))

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor:
        generator = self.generators[layer // self.share_every]
        assert isinstance(generator, Generator)
        states = cast_and_normalize(states, generator.down, self.normalize_input)
        return generator(states, mask, self.activations[layer])

    def keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.gates is not None
        return keys, values * self.gates[layer].tanh().to(values.dtype)

    def observed(self) -> Sequence[nn.Module]:
        return list(self.activations)


def build(config: IaptConfig, backbone: Backbone) -> Iapt:
    """The method at its start."""
    return Iapt(config, backbone.num_layers, backbone.hidden_size)


def count(config: IaptConfig, backbone: Backbone) -> int:
    """ceil(L / k) (2 d r + r s) + R (m + 1 + n) + G: R layers with learned rational activations, G gates.

    Without r s unless the pooling is `self_attention`.
    """
    layers, r = backbone.num_layers, config.bottleneck
    queries = r * config.num_soft_tokens if config.pooling == "self_attention" else 0
    learned = 0 if config.activation_training == "frozen" else config.activations(layers).count("rational")
    gates = layers if config.output_start == "gated" else 0
    blocks = -(-layers // config.share_every)
    return blocks * (2 * backbone.hidden_size * r + queries) + learned * (sum(config.degrees) + 1) + gates


register("iapt", MethodSpec(IaptConfig, build, count))
