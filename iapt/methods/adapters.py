"""Bottleneck adapters after (Houlsby) or beside (parallel) the sublayers of every decoder layer.

    houlsby            y + W_up act(W_down y + b_1) + b_2           y = Sub(x), before the residual sum
    parallel_adapter   y + scale * W_up act(W_down x)               x what the sublayer reads

Houlsby et al., ICML 2019 (arXiv 1902.00751), Section 2.1 and Figure 2; the layer norms, which the paper trains
along, stay frozen here. `sublayers: [ffn]` is the variant of Pfeiffer et al., EACL 2021 (arXiv 2005.00247), again
without a norm of its own. Parallel: He et al., ICLR 2022 (arXiv 2110.04366), Table 1 and Section 4.

Where a model normalises a sublayer's output before the residual sum (Gemma 2), adapters stand ahead of that norm
(label I: the papers' models have none).

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from iapt.config.fields import at_least, choice
from iapt.config.method import MethodConfig, SizeKnob
from iapt.methods.registry import MethodSpec, register
from iapt.model.architecture import SUBLAYERS, find_sublayers
from iapt.model.backbone import Backbone
from iapt.model.method import WeightMethod

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh}


@dataclass
class AdapterConfig(MethodConfig):
    """The settings that both forms share. `sublayers` names those of `attention` and `ffn` that get an adapter."""

    bottleneck: int = at_least(64, 1)
    sublayers: list[str] = field(default_factory=lambda: list(SUBLAYERS))
    activation: str = choice("relu", *ACTIVATIONS)
    bias: bool = False

    def problems(self) -> list[str]:
        chosen = self.sublayers
        if chosen and set(chosen) <= set(SUBLAYERS) and len(set(chosen)) == len(chosen):
            return []
        return [f"method.sublayers = {chosen}: allowed are {' and '.join(SUBLAYERS)}, one or both, each once"]

    def size_knob(self) -> SizeKnob:
        return SizeKnob("bottleneck")


@dataclass
class HoulsbyConfig(AdapterConfig):
    """Sequential adapters. Both projections start at N(0, 0.01^2) cut at two standard deviations (Section 3.6)."""

    activation: str = choice("gelu", *ACTIVATIONS)
    bias: bool = True


@dataclass
class ParallelAdapterConfig(AdapterConfig):
    """Parallel adapters. The up-projection starts at zero, the down-projection as LoRA's A does (Section 4.1)."""

    scale: float = at_least(4.0, 0)


class Bottleneck(nn.Module):
    """W_up act(W_down x): (..., d) in any float dtype -> (..., d), float32 unless autocast says otherwise."""

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        self.down = nn.Linear(width, config.bottleneck, bias=config.bias)
        self.up = nn.Linear(config.bottleneck, width, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        if isinstance(config, ParallelAdapterConfig):
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        else:
            for linear in (self.down, self.up):
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
        if config.bias:
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(self.activation(self.down(x.to(self.down.weight.dtype))))
        return up


class Adapters(WeightMethod):
    """One bottleneck per layer and chosen sublayer, attached by forward hooks; the backbone's modules stay its own."""

    def __init__(self, config: AdapterConfig, backbone: Backbone) -> None:
        super().__init__()
        self._scale = config.scale if isinstance(config, ParallelAdapterConfig) else None
        places = [find_sublayers(layer) for layer in backbone.layers]
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Bottleneck(backbone.hidden_size, config) for name in config.sublayers}) for _ in places
        )
        for bottlenecks, place in zip(self.layers, places, strict=True):
            assert isinstance(bottlenecks, nn.ModuleDict)
            for name, bottleneck in bottlenecks.items():
                first, last = place[name]
                if self._scale is None:
                    last.register_forward_hook(partial(self._after, bottleneck))
                else:
                    read: list[Tensor] = []
                    first.register_forward_pre_hook(partial(self._keep_input, read), with_kwargs=True)
                    last.register_forward_hook(partial(self._beside, bottleneck, read))

    def _after(self, bottleneck: nn.Module, module: nn.Module, args: Any, output: Any) -> Any:
        return _add(output, bottleneck(_hidden(output))) if self.active else None

    def _keep_input(self, read: list[Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active:
            # One call's input at most: a recomputation that stops early may have left its own behind.
            read[:] = [args[0] if args else kwargs["hidden_states"]]

    def _beside(self, bottleneck: nn.Module, read: list[Tensor], module: nn.Module, args: Any, output: Any) -> Any:
        return _add(output, self._scale * bottleneck(read.pop())) if self.active else None


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _add(output: Any, delta: Tensor) -> Any:
    """The sublayer's output, a tensor or a tuple that begins with one, plus delta, in its own dtype."""
    hidden = _hidden(output)
    total = (hidden + delta).to(hidden.dtype)
    return (total, *output[1:]) if isinstance(output, tuple) else total


def build(config: AdapterConfig, backbone: Backbone) -> Adapters:
    """Raises UserError if a decoder layer's sublayers cannot be found or used."""
    return Adapters(config, backbone)


def count(config: AdapterConfig, backbone: Backbone) -> int:
    """L sublayers 2 d b, and L sublayers (b + d) more with biases."""
    d, b = backbone.hidden_size, config.bottleneck
    return backbone.num_layers * len(config.sublayers) * (2 * d * b + (b + d if config.bias else 0))


register("houlsby", MethodSpec(HoulsbyConfig, build, count))
register("parallel_adapter", MethodSpec(ParallelAdapterConfig, build, count))
