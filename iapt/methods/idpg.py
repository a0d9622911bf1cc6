"""IDPG: instance-dependent prompt generation (Wu et al., NAACL 2022), ported to decoders.

A bottleneck generator turns a summary f(x) of the instruction into s soft tokens at once:

    P = reshape(W2 drop(gelu(W1 f + b1)) + b2, (s, d))

`layers: single` (S-IDPG): f comes from a separate pass of the frozen backbone, P enters at the input.
`layers: multi` (M-IDPG): at every layer f is read from the running pass and P is *added* to the soft tokens' states,
which persist through the layers. As shipped by its authors, one generator serves all layers with an output bias a
layer (`sharing: layer_bias`); `none` and `all` are their ablations.
`projection: phm` writes W1 and W2 as sums of Kronecker products.

The port: the original encoder reads its first token, which under a causal mask has seen nothing; here f is the last
instruction token's state, or the mean over the instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.config.fields import at_least, choice
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.edits.layer_input import LayerInput
from iapt.model.method import SoftPrompt
from iapt.nn.norm import cast_and_normalize
from iapt.nn.phm import PHMLinear, phm_parameters
from iapt.nn.pooling import mean_pool


@dataclass
class IdpgConfig(SoftPromptConfig):
    """Defaults are the authors' shipped ones: 5 tokens, bottleneck 16, PHM with n = 16, dropout 0.1."""

    learning_rate: float = at_least(5e-3, 0)
    num_soft_tokens: int = at_least(5, 1)
    bottleneck: int = at_least(16, 1)
    layers: str = choice("multi", "single", "multi")
    projection: str = choice("phm", "dense", "phm")
    phm_n: int = at_least(16, 1)
    sharing: str = choice("layer_bias", "layer_bias", "all", "none")
    pooling: str = choice("last", "last", "mean")
    position: str = choice("before_instruction", "before_instruction", "after_instruction")
    dropout: float = at_least(0.1, 0)
    normalize_input: bool = True

    def problems(self) -> list[str]:
        found = []
        if self.projection == "phm" and self.bottleneck % self.phm_n:
            found.append(
                f"method.phm_n = {self.phm_n}: must divide method.bottleneck = {self.bottleneck} with projection = phm"
            )
        if not self.dropout < 1:
            found.append(f"method.dropout = {self.dropout}: must be below 1")
        return found

    def size_knob(self) -> SizeKnob:
        return SizeKnob("bottleneck", self.phm_n if self.projection == "phm" else 1)

    @property
    def own_generators(self) -> bool:
        return self.layers == "multi" and self.sharing == "none"

    @property
    def own_biases(self) -> bool:
        return self.layers == "multi" and self.sharing != "all"


class Generator(nn.Module):
    """W1, b1, W2: (B, d) -> (B, s d); the output bias b2 lives with the layers."""

    def __init__(self, config: IdpgConfig, width: int) -> None:
        super().__init__()
        outputs = config.num_soft_tokens * width
        if config.projection == "phm":
            self.down: nn.Module = PHMLinear(width, config.bottleneck, config.phm_n)
            self.up: nn.Module = PHMLinear(config.bottleneck, outputs, config.phm_n, bias=False)
        else:
            self.down = nn.Linear(width, config.bottleneck)
            self.up = nn.Linear(config.bottleneck, outputs, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, summary: Tensor) -> Tensor:
        """(B, d) -> (B, s d)."""
        return self.up(self.dropout(F.gelu(self.down(summary))))


class Idpg(SoftPrompt):
    """S-IDPG or M-IDPG."""

    def __init__(self, config: IdpgConfig, num_layers: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_soft_tokens = config.num_soft_tokens
        self.position = config.position
        self.generators = nn.ModuleList(
            Generator(config, width) for _ in range(num_layers if config.own_generators else 1)
        )
        # Biases at zero would start every soft token at the generator's output alone, all tokens near each other.
        rows = num_layers if config.own_biases else 1
        self.bias = nn.Parameter(torch.randn(rows, config.num_soft_tokens, width) * 0.02)

    def edits(self) -> Sequence[Edit]:
        return (LayerInput(self, reads="encoding" if self.config.layers == "single" else "layers"),)

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor | None:
        config = self.config
        if config.layers == "single" and layer > 0:
            return None
        states = cast_and_normalize(states, self.bias, config.normalize_input)
        # Padding is on the left: the last column is the last token.
        summary = states[:, -1] if config.pooling == "last" else mean_pool(states, mask)
        generated = self.generators[layer if config.own_generators else 0](summary)
        bias = self.bias[layer if config.own_biases else 0]
        return previous + generated.unflatten(-1, (self.num_soft_tokens, -1)) + bias


def build(config: IdpgConfig, backbone: Backbone) -> Idpg:
    """Raises UserError if PHM's n does not divide the backbone's width."""
    if config.projection == "phm" and backbone.hidden_size % config.phm_n:
        raise UserError(
            f"method.phm_n = {config.phm_n}: must divide the backbone's width {backbone.hidden_size} with "
            "method.projection = phm"
        )
    return Idpg(config, backbone.num_layers, backbone.hidden_size)


def count(config: IdpgConfig, backbone: Backbone) -> int:
    """Dense: G (d r + r + r s d) + R s d; PHM: each product a b becomes n^3 + a b / n; G generators, R biases."""
    width, r, outputs = backbone.hidden_size, config.bottleneck, config.num_soft_tokens * backbone.hidden_size
    if config.projection == "phm":
        generator = phm_parameters(width, r, config.phm_n) + phm_parameters(r, outputs, config.phm_n, bias=False)
    else:
        generator = width * r + r + r * outputs
    generators = backbone.num_layers if config.own_generators else 1
    biases = backbone.num_layers if config.own_biases else 1
    return generators * generator + biases * outputs


register("idpg", MethodSpec(IdpgConfig, build, count))
