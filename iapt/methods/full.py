"""Full fine-tuning: every parameter of the backbone is trained, the yardstick that the others save against.

The trained copy is float32, whatever the backbone was loaded as; with `hardware.precision=bf16` autocast computes in
bfloat16. As for every method the backbone stays in eval mode, so its own dropout does not act.

The originals wait in main memory, in their own dtype, and `disabled` puts them back bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from iapt.config.errors import UserError
from iapt.config.fields import at_least
from iapt.config.method import MethodConfig
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.method import WeightMethod


@dataclass
class FullConfig(MethodConfig):
    """Nothing to set but the learning rate."""

    learning_rate: float = at_least(3e-4, 0)
    trains_backbone: ClassVar[bool] = True  # nothing is left frozen that FSDP could shard


class Full(WeightMethod):
    """Owns no tensors: the trained ones are the backbone's, under the backbone's names, tied ones once."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        # In a plain dict, so that this module does not own (and move, and list) the backbone's parameters.
        self._weights = dict(backbone.lm.named_parameters())
        self._originals = {name: p.detach().cpu().clone() for name, p in self._weights.items()}
        for parameter in self._weights.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self._weights

    @contextmanager
    def disabled(self) -> Iterator[None]:
        # The trained weights change places with the originals instead of standing beside them on the device.
        trained = {name: p.data.cpu() for name, p in self._weights.items()}
        try:
            for name, parameter in self._weights.items():
                parameter.data = self._originals[name].to(parameter.device)
            yield
        finally:
            for name, parameter in self._weights.items():
                parameter.data = trained[name].to(parameter.device)


def build(config: FullConfig, backbone: Backbone) -> Full:
    """Raises UserError for a quantised backbone, whose weights cannot be trained."""
    if getattr(backbone.lm, "is_quantized", False):
        raise UserError("backbone.quantization: method full trains the weights themselves; allowed is none")
    return Full(backbone)


def count(config: FullConfig, backbone: Backbone) -> int:
    """Every parameter of the backbone, tied ones once."""
    return sum(p.numel() for p in backbone.lm.parameters())


register("full", MethodSpec(FullConfig, build, count))
