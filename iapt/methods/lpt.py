"""LPT: late prompt tuning (Liu et al., Findings of EMNLP 2022): soft tokens that enter at a middle layer.

A generator reads the instruction's states right before layer k and writes the soft tokens, which stand in the
sequence from there on; below it nothing sees them, so nothing below it keeps a gradient:

    naive     P = reshape(W2 relu(W1 h_last + b1) + b2, (s, d)),          NPG, h_last the last instruction token's state
    pooling   p_i = W2 relu(pool_i(W1 H + b1)) + b2,  i = 1 .. s,          PPG, s contiguous segments of the instruction

The paper inserts tokens into the running sequence; here their columns stand there from the start, hidden below
layer k, so their positions are counted from the start too (I).

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.config.fields import at_least, choice
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.edits.layer_input import LayerInput
from iapt.model.edits.masked_layers import MaskedLayers
from iapt.model.method import SoftPrompt
from iapt.nn.norm import cast_and_normalize
from iapt.nn.pooling import segment_pool


@dataclass
class LptConfig(SoftPromptConfig):
    """The settings of LPT. `layer` is the number of layers that run before the soft tokens enter; null stands for
    half of them. `reduce` is read only with the generator `pooling`. The authors use 5 soft tokens and a
    bottleneck of 128.
    """

    learning_rate: float = at_least(3e-3, 0)
    num_soft_tokens: int = at_least(5, 1)
    position: str = choice("before_instruction", "before_instruction", "after_instruction")
    layer: int | None = at_least(None, 0)
    generator: str = choice("naive", "naive", "pooling")
    reduce: str = choice("mean", "mean", "max")
    bottleneck: int = at_least(64, 1)
    dropout: float = at_least(0.1, 0)
    # Residual streams differ in scale between backbones and layers by orders of magnitude.
    normalize_input: bool = True

    def problems(self) -> list[str]:
        return [] if self.dropout < 1 else [f"method.dropout = {self.dropout}: must be below 1"]

    def size_knob(self) -> SizeKnob:
        return SizeKnob("bottleneck")


class Lpt(SoftPrompt):
    """One generator, `down` (d -> m) and `up` (m -> s d, or m -> d with pooling), at `layer`."""

    def __init__(self, config: LptConfig, layer: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_soft_tokens = config.num_soft_tokens
        self.position = config.position
        self.layer = layer
        self.masked_layers = frozenset(range(layer))
        self.down = nn.Linear(width, config.bottleneck)
        self.up = nn.Linear(config.bottleneck, width * (config.num_soft_tokens if config.generator == "naive" else 1))
        self.dropout = nn.Dropout(config.dropout)

    def edits(self) -> Sequence[Edit]:
        return (LayerInput(self), MaskedLayers(self)) if self.masked_layers else (LayerInput(self),)

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor | None:
        if layer != self.layer:
            return None
        states = cast_and_normalize(states, self.down.weight, self.config.normalize_input)
        if self.config.generator == "pooling":
            pooled = segment_pool(self.down(states), mask, self.num_soft_tokens, self.config.reduce)
            return self.up(self.dropout(pooled.relu()))
        # Padding is on the left: the last column is the last token.
        generated = self.up(self.dropout(self.down(states[:, -1]).relu()))
        return generated.unflatten(-1, (self.num_soft_tokens, -1))


def build(config: LptConfig, backbone: Backbone) -> Lpt:
    """Raises UserError if the backbone has no layer `layer`."""
    layers = backbone.num_layers
    layer = layers // 2 if config.layer is None else config.layer
    if not 0 <= layer < layers:
        raise UserError(
            f"method.layer = {layer}: backbone {backbone.name} has {layers} layers, allowed are 0 to {layers - 1}"
        )
    return Lpt(config, layer, backbone.hidden_size)


def count(config: LptConfig, backbone: Backbone) -> int:
    """m (d + 1) + out (m + 1), out = s d with generator naive, d with pooling."""
    d, m = backbone.hidden_size, config.bottleneck
    outputs = d * (config.num_soft_tokens if config.generator == "naive" else 1)
    return m * (d + 1) + outputs * (m + 1)


register("lpt", MethodSpec(LptConfig, build, count))
