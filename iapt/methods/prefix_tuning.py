"""Prefix tuning (Li & Liang, ACL 2021) and P-tuning v2 (Liu et al., ACL 2022): free soft tokens at every layer.

`form` says what a layer is given, `reparameterization` where that comes from:

    keys_values   K, V of each layer's soft columns, used as they are: no rotation is applied (Li & Liang, section 4)
    states        P^l (s, d) that the layer reads as hidden states (deep prompts)

    none          trained as they are
    mlp           W2^l tanh(W1 P' + b1) + b2^l with one P' (s, d) for all layers (Li & Liang, section 4.3)
    projected     v^l W^l, v^l (s, low_dim), a map a layer (MiLoRA's P-tuning v2: 640 -> 4096, label S)

Either way the soft columns stand in the sequence: text positions start at s before the instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from iapt.errors import UserError
from iapt.methods import MethodSpec, SizeKnob, SoftPrompt, SoftPromptConfig, register

if TYPE_CHECKING:
    from iapt.backbone import Backbone


@dataclass
class PrefixTuningConfig(SoftPromptConfig):
    """`mlp_width` is read with reparameterization mlp, `low_dim` with projected. `init_std`: standard deviation of
    what a layer is given at the start with none and projected; the mlp starts as torch's linear maps do."""

    num_soft_tokens: int = field(default=10, metadata={"minimum": 1})
    position: str = field(
        default="before_instruction", metadata={"choices": ("before_instruction", "after_instruction")}
    )
    form: str = field(default="keys_values", metadata={"choices": ("keys_values", "states")})
    reparameterization: str = field(default="mlp", metadata={"choices": ("none", "mlp", "projected")})
    mlp_width: int = field(default=64, metadata={"minimum": 1})
    low_dim: int = field(default=16, metadata={"minimum": 1})
    init_std: float = field(default=0.02, metadata={"minimum": 0})

    def size_knob(self) -> SizeKnob:
        knobs = {"none": "num_soft_tokens", "mlp": "mlp_width", "projected": "low_dim"}
        return SizeKnob(knobs[self.reparameterization])


class Free(nn.Module):
    """`prompts` (L, s, out)."""

    def __init__(self, config: PrefixTuningConfig, num_layers: int, outputs: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(num_layers, config.num_soft_tokens, outputs) * config.init_std)

    def forward(self, layer: int) -> Tensor:
        """What layer `layer` is given, (s, out)."""
        return self.prompts[layer]


class Mlp(nn.Module):
    """`prompts` P' (s, d), `down` W1 for all layers, `up` one W2^l a layer."""

    def __init__(self, config: PrefixTuningConfig, num_layers: int, outputs: int, d: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(config.num_soft_tokens, d))
        self.down = nn.Linear(d, config.mlp_width)
        # Kept apart, so that no layer computes the others' share.
        self.up = nn.ModuleList(nn.Linear(config.mlp_width, outputs) for _ in range(num_layers))

    def forward(self, layer: int) -> Tensor:
        """What layer `layer` is given, (s, out)."""
        return self.up[layer](self.down(self.prompts).tanh())


class Projected(nn.Module):
    """`prompts` v (L, s, low_dim), `maps` W (L, low_dim, out)."""

    def __init__(self, config: PrefixTuningConfig, num_layers: int, outputs: int) -> None:
        super().__init__()
        low = config.low_dim
        self.prompts = nn.Parameter(torch.randn(num_layers, config.num_soft_tokens, low))
        self.maps = nn.Parameter(torch.randn(num_layers, low, outputs) * config.init_std * low**-0.5)

    def forward(self, layer: int) -> Tensor:
        """What layer `layer` is given, (s, out)."""
        return self.prompts[layer] @ self.maps[layer]


class PrefixTuning(SoftPrompt):
    """A source of soft tokens, handed to the layers as hidden states or as keys and values."""

    reads = "nothing"

    def __init__(self, config: PrefixTuningConfig, num_layers: int, d: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_soft_tokens = config.num_soft_tokens
        self.position = config.position
        self.edits_cache = config.form == "keys_values"
        self.heads = (heads, head_dim)
        outputs = 2 * heads * head_dim if self.edits_cache else d
        self.source: nn.Module
        if config.reparameterization == "mlp":
            self.source = Mlp(config, num_layers, outputs, d)
        else:
            kind = Free if config.reparameterization == "none" else Projected
            self.source = kind(config, num_layers, outputs)

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor | None:
        return None if self.edits_cache else self.source(layer).expand_as(previous)

    def keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `SoftPrompt.keys_values`. Raises UserError where the layer's heads are not what its config says."""
        heads, head_dim = self.heads
        for given in (keys, values):
            if (given.shape[1], given.shape[3]) != self.heads:
                raise UserError(
                    f"method.form = keys_values: layer {layer} of this backbone keeps {given.shape[1]} heads of width "
                    f"{given.shape[3]}, its config says {heads} of {head_dim}; method.form = states works everywhere"
                )
        # (s, 2 H_kv d_h) -> (2, H_kv, s, d_h), peft's order.
        pair = self.source(layer).view(-1, 2, heads, head_dim).permute(1, 2, 0, 3)
        return pair[0].expand_as(keys).to(keys.dtype), pair[1].expand_as(values).to(values.dtype)


def key_value_heads(backbone: Backbone) -> tuple[int, int]:
    """(H_kv, d_h): how many key/value heads a layer has, and how wide they are.

    Read from transformers' config: grouped-query models name their key/value heads, GPT-2 and OPT have as many as
    heads; Gemma and others state a head width that is not d / H.
    """
    config = backbone.lm.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads), int(getattr(config, "head_dim", None) or backbone.hidden_size // config.num_attention_heads)


def build(config: PrefixTuningConfig, backbone: Backbone) -> PrefixTuning:
    """The method at its start."""
    return PrefixTuning(config, backbone.num_layers, backbone.hidden_size, *key_value_heads(backbone))


def count(config: PrefixTuningConfig, backbone: Backbone) -> int:
    """With out = d (states) or 2 H_kv d_h: none L s out; mlp s d + k (d + 1) + L out (k + 1); projected
    L low_dim (s + out)."""
    layers, d, s, k = backbone.num_layers, backbone.hidden_size, config.num_soft_tokens, config.mlp_width
    heads, head_dim = key_value_heads(backbone)
    outputs = d if config.form == "states" else 2 * heads * head_dim
    if config.reparameterization == "none":
        return layers * s * outputs
    if config.reparameterization == "mlp":
        return s * d + k * (d + 1) + layers * outputs * (k + 1)
    return layers * config.low_dim * (s + outputs)


register("prefix_tuning", MethodSpec(PrefixTuningConfig, build, count))
