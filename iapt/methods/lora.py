"""LoRA (Hu et al., ICLR 2022) through peft: W' = W + (alpha / r) B A on the chosen linear maps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from iapt.errors import UserError
from iapt.methods import MethodConfig, MethodSpec, WeightMethod, register

if TYPE_CHECKING:
    from iapt.backbone import Backbone


@dataclass
class LoraConfig(MethodConfig):
    """`target_modules`: module name endings, or the one entry `all-linear` for every linear map but the LM head."""

    rank: int = field(default=8, metadata={"minimum": 1})
    alpha: float = field(default=16.0, metadata={"minimum": 0})
    dropout: float = field(default=0.0, metadata={"minimum": 0})
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])

    def problems(self) -> list[str]:
        return [] if self.dropout < 1 else [f"method.dropout = {self.dropout}: must be below 1"]


class Lora(WeightMethod):
    """peft's layers inside the backbone; this object knows them but holds no copy."""

    def __init__(self, config: LoraConfig, backbone: Backbone) -> None:
        super().__init__()
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = "all-linear" if config.target_modules == ["all-linear"] else config.target_modules
        peft_config = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        try:
            with warnings.catch_warnings():
                # peft 0.21 asks transformers by a deprecated name, and Conv1D's orientation it settles by itself.
                warnings.simplefilter("ignore")
                # The returned wrapper is dropped: the layers sit in `backbone.lm`, whose forward stays its own.
                get_peft_model(backbone.lm, peft_config)
        except ValueError as error:
            raise UserError(f"method.target_modules = {config.target_modules}: {error}") from None
        # In a plain list, so that this module does not own (and move, and list) parts of the backbone.
        self._layers = [m for m in backbone.lm.modules() if isinstance(m, BaseTunerLayer)]
        self._parameters_by_name = {
            name.replace(".default", ""): parameter
            for name, parameter in backbone.lm.named_parameters()
            if "lora_" in name
        }

    def trainable(self) -> dict[str, nn.Parameter]:
        return self._parameters_by_name

    def train(self, mode: bool = True) -> Lora:
        super().train(mode)
        for layer in self._layers:
            layer.lora_dropout.train(mode)
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)


def build(config: LoraConfig, backbone: Backbone) -> Lora:
    """Raises UserError if no module of the backbone matches `target_modules`."""
    return Lora(config, backbone)


def count(config: LoraConfig, backbone: Backbone) -> int:
    """The sum of r (in + out) over the targeted linear maps."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear map

    head = backbone.lm.get_output_embeddings()
    total = 0
    for name, module in backbone.lm.named_modules():
        name = name.removesuffix(".base_layer")  # the count holds before and after the layers are in place
        wanted = config.target_modules == ["all-linear"] or any(
            f".{name}".endswith(f".{t}") for t in config.target_modules
        )
        if not wanted or module is head or ".lora_" in name:
            continue
        if isinstance(module, nn.Linear):
            total += config.rank * (module.in_features + module.out_features)
        elif isinstance(module, Conv1D):
            total += config.rank * sum(module.weight.shape)
    return total


register("lora", MethodSpec(LoraConfig, build, count))
