"""Prefix tuning (Li & Liang, ACL 2021) and P-tuning v2 (Liu et al., ACL 2022): free soft tokens at every layer.

`form` says what a layer is given, `reparameterization` where that comes from:

    keys_values   K, V of each layer's soft columns, used as they are: no rotation is applied (Li & Liang, section 4)
    states        P^l (s, d) that the layer reads as hidden states (deep prompts)

    none          trained as they are
    mlp           W2^l tanh(W1 P' + b1) + b2^l with one P' (s, d) for all layers (Li & Liang, section 4.3)
    projected     v^l W^l, v^l (s, low_dim), a map a layer (MiLoRA's P-tuning v2: 640 -> 4096, label S)

Either way the soft columns stand in the sequence: text positions start at s before the instruction.

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
from iapt.methods.registry import MethodSpec, register
from iapt.model.architecture import arguments_of, check_keys_and_values, is_rewindable
from iapt.model.backbone import Backbone
from iapt.model.cache import PassCache
from iapt.model.edits.base import Edit
from iapt.model.edits.keys_values import KeysValues
from iapt.model.edits.layer_input import LayerInput
from iapt.model.method import SoftPrompt


@dataclass
class PrefixTuningConfig(SoftPromptConfig):
    """The settings of prefix tuning and P-tuning v2. `mlp_width` is read only with the reparameterization `mlp`, and
    `low_dim` only with `projected`. `init_std` is the standard deviation of the values that a layer is given at
    the start with `none` and `projected`; the mlp starts as torch's linear maps do.
    """

    learning_rate: float = at_least(3e-3, 0)
    num_soft_tokens: int = at_least(10, 1)
    position: str = choice("before_instruction", "before_instruction", "after_instruction")
    form: str = choice("keys_values", "keys_values", "states")
    reparameterization: str = choice("mlp", "none", "mlp", "projected")
    mlp_width: int = at_least(64, 1)
    low_dim: int = at_least(16, 1)
    init_std: float = at_least(0.02, 0)

    def size_knob(self) -> SizeKnob:
        knobs = {"none": "num_soft_tokens", "mlp": "mlp_width", "projected": "low_dim"}
        return SizeKnob(knobs[self.reparameterization])


class Free(nn.Module):
    """Values that are trained as they are: `prompts` (L, s, out)."""

    def __init__(self, config: PrefixTuningConfig, num_layers: int, outputs: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(num_layers, config.num_soft_tokens, outputs) * config.init_std)

    def forward(self, layer: int) -> Tensor:
        """Return the values (s, out) that layer `layer` is given."""
        return self.prompts[layer]


class Mlp(nn.Module):
    """Values made by an MLP: `prompts` P' (s, d), `down` W1 for all layers, and in `up` one W2^l for each layer."""

    def __init__(self, config: PrefixTuningConfig, num_layers: int, outputs: int, d: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(config.num_soft_tokens, d))
        self.down = nn.Linear(d, config.mlp_width)
        # Kept apart, so that no layer computes the others' share.
        self.up = nn.ModuleList(nn.Linear(config.mlp_width, outputs) for _ in range(num_layers))

    def forward(self, layer: int) -> Tensor:
        """Return the values (s, out) that layer `layer` is given."""
        return self.up[layer](self.down(self.prompts).tanh())


class Projected(nn.Module):
    """Values projected from fewer dimensions: `prompts` v (L, s, low_dim), `maps` W (L, low_dim, out)."""

    def __init__(self, config: PrefixTuningConfig, num_layers: int, outputs: int) -> None:
        super().__init__()
        low = config.low_dim
        self.prompts = nn.Parameter(torch.randn(num_layers, config.num_soft_tokens, low))
        self.maps = nn.Parameter(torch.randn(num_layers, low, outputs) * config.init_std * low**-0.5)

    def forward(self, layer: int) -> Tensor:
        """Return the values (s, out) that layer `layer` is given."""
        return self.prompts[layer] @ self.maps[layer]


class PrefixTuning(SoftPrompt):
    """A source of soft tokens, handed to the layers as hidden states or as keys and values."""

    def __init__(self, config: PrefixTuningConfig, num_layers: int, d: int, heads: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_soft_tokens = config.num_soft_tokens
        self.position = config.position
        self.form = config.form
        self.heads = heads
        outputs = _outputs(d, heads)
        self.source: nn.Module
        if config.reparameterization == "mlp":
            self.source = Mlp(config, num_layers, outputs, d)
        else:
            kind = Free if config.reparameterization == "none" else Projected
            self.source = kind(config, num_layers, outputs)

    def edits(self) -> Sequence[Edit]:
        return (KeysValues(self),) if self.form == "keys_values" else (LayerInput(self, reads="nothing"),)

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor:
        return self.source(layer).expand_as(previous)

    def keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.heads is not None
        heads, head_dim = self.heads
        # (s, 2 H_kv d_h) -> (2, H_kv, s, d_h), peft's order.
        pair = self.source(layer).view(-1, 2, heads, head_dim).permute(1, 2, 0, 3)
        return pair[0].expand_as(keys).to(keys.dtype), pair[1].expand_as(values).to(values.dtype)


def key_value_heads(backbone: Backbone) -> tuple[int, int]:
    """(H_kv, d_h): how many key/value heads every layer keeps, and how wide they are.

    Seen in a pass over two tokens: configs name them in many ways, and some not at all (multi-query attention).

    Raises:
        UserError: if layers differ in them, keys differ from values, or a layer keeps none.
    """
    lm, seen = backbone.lm, {}

    def note(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        seen[layer] = {(t.shape[1], t.shape[3]) for t in (keys, values)}
        return keys, values

    kind, otherwise = type(lm).__name__, "method.form = states does without"
    if not is_rewindable(lm):
        raise UserError(f"method.form = keys_values: {kind} has layers without keys and values; {otherwise}")
    for layer in backbone.layers:
        check_keys_and_values(layer)
    names, ids = arguments_of(lm), torch.zeros(1, 2, dtype=torch.long, device=lm.device)
    inputs = {"use_cache": True} if names.use_cache else {}
    with torch.no_grad():
        lm(input_ids=ids, **{names.cache: PassCache(None, note)}, **inputs)
    shapes = set().union(*seen.values())
    if len(seen) < backbone.num_layers or len(shapes) != 1:
        raise UserError(
            f"method.form = keys_values: layers of {kind} keep (heads, width) {sorted(shapes)} in {len(seen)} of its "
            f"{backbone.num_layers} layers, and one shape in all of them is needed; {otherwise}"
        )
    return shapes.pop()


def build(config: PrefixTuningConfig, backbone: Backbone) -> PrefixTuning:
    """The method at its start."""
    return PrefixTuning(config, backbone.num_layers, backbone.hidden_size, _heads(config, backbone))


def _heads(config: PrefixTuningConfig, backbone: Backbone) -> tuple[int, int] | None:
    return key_value_heads(backbone) if config.form == "keys_values" else None


def _outputs(d: int, heads: tuple[int, int] | None) -> int:
    """Return how many numbers a layer is given for each soft token: d, or as many as its keys and values have."""
    return d if heads is None else 2 * heads[0] * heads[1]


def count(config: PrefixTuningConfig, backbone: Backbone) -> int:
    """With out = d (states) or 2 H_kv d_h: none L s out; mlp s d + k (d + 1) + L out (k + 1); projected
    L low_dim (s + out)."""
    layers, d, s, k = backbone.num_layers, backbone.hidden_size, config.num_soft_tokens, config.mlp_width
    outputs = _outputs(d, _heads(config, backbone))
    if config.reparameterization == "none":
        return layers * s * outputs
    if config.reparameterization == "mlp":
        return s * d + k * (d + 1) + layers * outputs * (k + 1)
    return layers * config.low_dim * (s + outputs)


register("prefix_tuning", MethodSpec(PrefixTuningConfig, build, count))
