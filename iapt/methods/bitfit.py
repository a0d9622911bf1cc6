"""BitFit (Ben Zaken et al., ACL 2022, arXiv 2106.10199): train the bias terms and nothing else.

A bias is trained as a difference from its value, started at zero and added to the module's output: b + delta has
the gradient that b has, and AdamW steps depend on the gradient alone, so this equals training the bias itself
(with weight decay it pulls towards the backbone's bias instead of towards zero). The backbone is never written to.

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.config.fields import at_least
from iapt.config.method import MethodConfig
from iapt.methods.registry import MethodSpec, register
from iapt.model.architecture import is_rewindable
from iapt.model.backbone import Backbone
from iapt.model.method import WeightMethod
from iapt.model.reach import reached


@dataclass
class BitFitConfig(MethodConfig):
    """The settings of BitFit. With `create_missing`, linear maps of the decoder layers that have no bias get one,
    started at zero (label I: the paper's models have all of them, LLaMA's family has next to none).
    """

    learning_rate: float = at_least(1e-2, 0)
    create_missing: bool = True


class BitFit(WeightMethod):
    """delta (n,) in float32 for every bias, added by forward hooks."""

    def __init__(self, config: BitFitConfig, backbone: Backbone) -> None:
        super().__init__()
        if not is_rewindable(backbone.lm):
            raise UserError(
                f"method: BitFit's biases act on padding too, and layers of {type(backbone.lm).__name__} keep other "
                "states than keys and values, which would carry that into the text; method=lora does without biases"
            )
        modules = biased_modules(backbone, config.create_missing)
        if not modules:
            raise UserError(
                f"method.create_missing = false: {type(backbone.lm).__name__} has no biases to train; true adds some"
            )
        # torch does not allow dots in the names of parameters.
        names = {name: name.replace(".", "/") for name in modules}
        self.deltas = nn.ParameterDict({names[name]: torch.zeros(_width(m)) for name, m in modules.items()})
        for name, module in modules.items():
            module.register_forward_hook(partial(self._add, names[name]))

    def _add(self, name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return (output + self.deltas[name]).to(output.dtype) if self.active else None


def biased_modules(backbone: Backbone, create_missing: bool) -> dict[str, nn.Module]:
    """The modules whose bias is trained, by name: linear maps and layer norms of the whole model that have one, and
    with `create_missing` the linear maps of the decoder layers that have none; those alone that texts reach."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear map

    inside = {m for layer in backbone.layers for m in layer.modules()}
    found = {}
    for name, module in backbone.lm.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D)
        has_bias = (linear or isinstance(module, nn.LayerNorm)) and module.bias is not None
        if has_bias or (create_missing and linear and module in inside):
            found[name] = module
    return {name: found[name] for name in reached(backbone.lm, found)}


def _width(module: nn.Module) -> int:
    """n, the length of a module's bias; a quantised weight's own shape would not tell."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return int(module.nf)  # type: ignore[arg-type]  # Conv1D


def build(config: BitFitConfig, backbone: Backbone) -> BitFit:
    """Raises UserError if there is no bias to train."""
    return BitFit(config, backbone)


def count(config: BitFitConfig, backbone: Backbone) -> int:
    """The sum of the biases' lengths."""
    return sum(_width(module) for module in biased_modules(backbone, config.create_missing).values())


register("bitfit", MethodSpec(BitFitConfig, build, count))
