"""SPT: selective prompt tuning (Zhu & Tan, EMNLP 2023, arXiv 2310.20127): which layers get soft tokens is learned.

First a search: every layer has a generator, whose soft tokens pass a learned gate, and the gates learn on held-out
batches while the generators learn on train batches. Then the k layers with the largest gates are kept and trained from
their start again; the others see no soft token. Only the abstract was at hand: a generated prompt behind a learnable
probabilistic gate at each intermediate layer, bi-level training, layers selected (A). The rest is R, a reconstruction
in the form of LPT (same kind of generator) and IAPT (same first author), or I, ours:

    P_l = relu(pool(h_l W_down)) W_up         per layer, s contiguous segments pooled, no biases           (R)
    a_l = sigmoid(alpha_l), alpha_l = 0       the gate; it multiplies the values of layer l's soft tokens  (A; place: I)
    alpha on held-out batches, W on train     first-order, in alternation; SPT-DARTS' own terms are not known (R)
    kept = top-k of a                         after `search_share` of the steps; from then on a_l is 1     (R; share: I)

Values, because a norm ahead of the attention divides any scale of P itself out again. A gate near 0 leaves the soft
tokens their share of the attention, which a layer that is not kept does not have: there they are hidden, as if the
layer had none (I). Without biases r = 64 at every layer of LLaMA-2 7B makes the 16.8M of ALoRA's table.

The generators that are kept go back to their initial values, and optimiser and learning rate start anew with them (I).
A checkpoint from before that is never chosen. `count` is of the search; what is active after it is reported.

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.config.fields import at_least, choice
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.edits.keys_values import KeysValues
from iapt.model.edits.layer_input import LayerInput
from iapt.model.edits.masked_layers import MaskedLayers
from iapt.model.method import BiLevel, SoftPrompt
from iapt.nn.norm import cast_and_normalize
from iapt.nn.pooling import segment_pool


@dataclass
class SptConfig(SoftPromptConfig):
    """The generators, and the search for their layers.

    Attributes:
        bottleneck: r, the budget knob.
        reduce: how a segment of the instruction is summed up.
        keep: k, how many layers stay; null: half of them.
        layers: the layers that stay, counted from 0. Given, nothing is searched and no other layer has a generator.
        search_share: of the steps.
        gate_training: `strict` learns the gates on a share carved from train, `paper` on dev, which then also selects
            the checkpoint; `joint` with the generators, on the same batches.
        held_out_share: of train, with `strict`; after the search these examples train too.
        gate_learning_rate: large, since a gate that hardly moves in so short a search says little about its layer (I).
    """

    learning_rate: float = at_least(3e-3, 0)
    num_soft_tokens: int = at_least(5, 1)
    position: str = choice("before_instruction", "before_instruction", "after_instruction")
    bottleneck: int = at_least(64, 1)
    reduce: str = choice("mean", "mean", "max")
    keep: int | None = at_least(None, 1)
    layers: list[int] | None = None
    search_share: float = 0.5
    gate_training: str = choice("strict", "strict", "paper", "joint")
    held_out_share: float = 0.1
    gate_learning_rate: float = at_least(1e-1, 0)
    # Residual streams differ in scale between backbones and layers by orders of magnitude.
    normalize_input: bool = True
    output_std: float = at_least(0.02, 0)  # of W_up's start

    def problems(self) -> list[str]:
        found = [
            f"method.{name} = {value}: must be above 0 and below 1"
            for name, value in (("search_share", self.search_share), ("held_out_share", self.held_out_share))
            if not 0 < value < 1
        ]
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            found.append(f"method.layers = {self.layers}: expected one layer or more, each of them once")
        if self.layers is not None and self.keep is not None:
            found.append(f"method.keep = {self.keep}: method.layers names what is kept; leave one of them null")
        return found

    def size_knob(self) -> SizeKnob:
        return SizeKnob("bottleneck")


class Generator(nn.Module):
    """One layer's projections: W_down (d, r) and W_up (r, d)."""

    def __init__(self, config: SptConfig, width: int) -> None:
        super().__init__()
        self.bins, self.reduce = config.num_soft_tokens, config.reduce
        self.down = nn.Parameter(torch.randn(width, config.bottleneck) * width**-0.5)
        self.up = nn.Parameter(torch.randn(config.bottleneck, width) * config.output_std)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """States (B, N, d), mask (B, N) bool -> soft tokens (B, s, d)."""
        return segment_pool(states @ self.down, mask, self.bins, self.reduce).relu() @ self.up


class Spt(SoftPrompt):
    """A generator a layer, and their gates.

    Attributes:
        kept: (L,) bool: the layers that have soft tokens; none while it is searched, when all layers have. Saved with
            the adapter unless the layers were given.
        gates: alpha, (L,); None if the layers were given.
    """

    kept: Tensor
    gates: nn.Parameter | None

    def __init__(self, config: SptConfig, num_layers: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_soft_tokens = config.num_soft_tokens
        self.position = config.position
        self.keep = num_kept(config, num_layers)
        layers = range(num_layers) if config.layers is None else sorted(config.layers)
        self.generators = nn.ModuleDict({str(layer): Generator(config, width) for layer in layers})
        self.register_buffer("kept", torch.zeros(num_layers, dtype=torch.bool), persistent=config.layers is None)
        self._search_steps, self._starts = 0, dict[str, Tensor]()
        if config.layers is not None:
            self.register_parameter("gates", None)
            self.kept[config.layers] = True
            return
        self.gates = nn.Parameter(torch.zeros(num_layers))
        self.lr_overrides = {"gates": config.gate_learning_rate}
        if config.gate_training != "joint":
            source = "dev" if config.gate_training == "paper" else "train"
            self.bilevel = BiLevel("gates", source, config.held_out_share)

    def edits(self) -> Sequence[Edit]:
        gated = () if self.gates is None else (KeysValues(self),)
        return (LayerInput(self), *gated, MaskedLayers(self))

    @property
    def masked_layers(self) -> frozenset[int]:
        kept = self.kept.tolist()
        return frozenset(layer for layer, stays in enumerate(kept) if not stays) if any(kept) else frozenset()

    def idle(self) -> frozenset[str]:
        """Once layers are chosen, the gates and the generators of the other layers are idle."""
        hidden = tuple(f"generators.{layer}." for layer in self.masked_layers)
        return frozenset(name for name in self.trainable() if hidden and (name == "gates" or name.startswith(hidden)))

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor:
        generator = self.generators[str(layer)]
        assert isinstance(generator, Generator)
        states = cast_and_normalize(states, generator.down, self.config.normalize_input)
        return generator(states, mask)

    def keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.gates is not None
        # On the device, without asking it: a question would wait for all that was sent there.
        gate = self.gates[layer].sigmoid().masked_fill(self.kept.any(), 1.0)
        return keys, values * gate.to(values.dtype)

    def on_train_start(self, total_steps: int) -> None:
        """Raises UserError if `search_share` leaves no step to search in, or none behind the search."""
        self._follow()
        if self.kept.any():  # given, or those of the adapter that training starts from
            return
        self._search_steps = round(self.config.search_share * total_steps)
        if not 0 < self._search_steps < total_steps:
            raise UserError(
                f"method.search_share = {self.config.search_share}: of the run's {total_steps} steps it leaves "
                f"{self._search_steps} to the search and {total_steps - self._search_steps} to what follows; "
                "each needs one at least"
            )
        self._starts = {name: p.detach().clone() for name, p in self.generators.named_parameters()}

    def on_phase_change(self, step: int) -> bool:
        """The search ends: the layers are chosen, and their generators are as they were at the start."""
        if step != self._search_steps:
            return False
        assert self.gates is not None
        with torch.no_grad():
            self.kept[self.gates.argsort(descending=True, stable=True)[: self.keep]] = True
            for name, parameter in self.generators.named_parameters():
                parameter.copy_(self._starts[name])
        self._starts = {}
        self._follow()
        return True

    def can_be_checkpoint(self, step: int) -> bool:
        """A checkpoint may be taken once the layers are chosen."""
        return bool(self.kept.any())

    def training_state(self) -> dict[str, Any]:
        return {"starts": self._starts}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._starts = state["starts"]
        self._follow()

    def _follow(self) -> None:
        """Once layers are chosen, train their generators alone, on all of train."""
        kept = self.kept.tolist()
        if not any(kept):
            return
        self.bilevel = None
        if self.gates is not None:
            self.gates.requires_grad_(False)
        for layer, generator in self.generators.items():
            generator.requires_grad_(kept[int(layer)])

    def findings(self) -> list[str]:
        """One line: the layers that are kept, every layer's gate, and how many parameters are active."""
        kept = [layer for layer, stays in enumerate(self.kept.tolist()) if stays]
        active = sum(p.numel() for layer in kept for p in self.generators[str(layer)].parameters())
        total = sum(p.numel() for p in self.parameters())
        line = f"layers kept: {', '.join(map(str, kept))}; {active:,} of {total:,} parameters are active"
        if self.gates is not None:
            line += f"; gates: {', '.join(f'{gate:.3f}' for gate in self.gates.detach().sigmoid().tolist())}"
        return [line]


def num_kept(config: SptConfig, num_layers: int) -> int:
    """Return how many of a backbone's layers have soft tokens in the end."""
    if config.layers is not None:
        return len(config.layers)
    return -(-num_layers // 2) if config.keep is None else config.keep


def build(config: SptConfig, backbone: Backbone) -> Spt:
    """Raises UserError if the backbone lacks a layer of `layers`, or has fewer than `keep`."""
    layers = backbone.num_layers
    if unknown := [layer for layer in config.layers or () if not 0 <= layer < layers]:
        raise UserError(
            f"method.layers = {config.layers}: backbone {backbone.name} has {layers} layers, {unknown} are not among "
            f"0 to {layers - 1}"
        )
    if num_kept(config, layers) > layers:
        raise UserError(f"method.keep = {config.keep}: backbone {backbone.name} has {layers} layers")
    return Spt(config, layers, backbone.hidden_size)


def count(config: SptConfig, backbone: Backbone) -> int:
    """2 L d r + L, generators and gates of the search; 2 k d r for k given layers."""
    layers = backbone.num_layers if config.layers is None else len(config.layers)
    gates = layers if config.layers is None else 0
    return 2 * layers * backbone.hidden_size * config.bottleneck + gates


register("spt", MethodSpec(SptConfig, build, count))
