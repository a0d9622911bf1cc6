"""The method variants that backbones are verified with: each takes another road through the engine or the backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from iapt.methods.registry import METHODS
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import Backbone

_S = {"num_soft_tokens": 4}
_AFTER = {"position": "after_instruction"}
_BEFORE = {"position": "before_instruction"}
_WORDS = {"label_words": ("w3", "w4", "w5")}


@dataclass(frozen=True)
class Variant:
    """A method and the settings under which it is verified."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shipped(self) -> str:
        """The method's name in configs/method."""
        names = {"LORA": "lora", "IA3": "ia3", "LN_TUNING": "ln_tuning", "ADAPTION_PROMPT": "llama_adapter"}
        return names[self.options["type"]] if self.method == "peft" else self.method


VARIANTS: dict[str, Variant] = {
    "zero_shot": Variant("zero_shot"),
    "prompt_tuning before": Variant("prompt_tuning", {**_S, **_BEFORE}),
    "prompt_tuning after": Variant("prompt_tuning", {**_S, **_AFTER}),
    "p_tuning": Variant("p_tuning", {**_S, "encoder": "mlp", "encoder_width": 10}),
    "iapt before": Variant("iapt", {**_S, **_BEFORE, "bottleneck": 8, "output_std": 0.3}),
    "iapt after": Variant("iapt", {**_S, **_AFTER, "bottleneck": 8, "output_std": 0.3}),
    "iapt gated": Variant("iapt", {**_S, **_AFTER, "bottleneck": 8, "output_std": 0.3, "output_start": "gated"}),
    "idpg multi": Variant("idpg", {**_S, "layers": "multi", "projection": "dense", "bottleneck": 8}),
    "idpg single": Variant("idpg", {**_S, "layers": "single", "projection": "dense", "bottleneck": 8}),
    "prefix_tuning keys_values": Variant("prefix_tuning", {**_S, "form": "keys_values", "reparameterization": "none"}),
    "prefix_tuning states": Variant("prefix_tuning", {**_S, "form": "states", "reparameterization": "none"}),
    "lpt before": Variant("lpt", {**_S, **_BEFORE, "bottleneck": 8}),
    "lpt after": Variant("lpt", {**_S, **_AFTER, "bottleneck": 8}),
    "spt": Variant("spt", {**_S, "bottleneck": 8, "output_std": 0.3}),
    "spt layers": Variant("spt", {**_S, "bottleneck": 8, "output_std": 0.3, "layers": [1]}),
    "para": Variant("para", {"bottleneck": 6}),
    "dept": Variant("dept", {"num_soft_tokens": 3, "rank": 2, "max_offsets": 6}),
    "ptec": Variant("ptec", {**_S, **_WORDS}),
    "LoRA": Variant("peft", {"type": "LORA"}),
    "(IA)3": Variant("peft", {"type": "IA3"}),
    "layer norm tuning": Variant("peft", {"type": "LN_TUNING"}),
    "LLaMA-Adapter": Variant("peft", {"type": "ADAPTION_PROMPT"}),
    "houlsby": Variant("houlsby", {"bottleneck": 6}),
    "parallel_adapter": Variant("parallel_adapter", {"bottleneck": 6}),
    "bitfit": Variant("bitfit"),
}


def attach(variant: Variant, backbone: Backbone, seed: int = 11) -> AdaptedModel:
    """The variant on a backbone, its trained tensors moved off their start so that nothing is a no-op by accident."""
    spec = METHODS[variant.method]
    config = spec.config(name=variant.method, **variant.options)
    if hasattr(config, "dropout"):
        config.dropout = 0.0  # equalities are tested, in train mode too
    torch.manual_seed(seed)
    model = AdaptedModel(backbone, spec.build(config, backbone))
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            small = "activations" in name or "norm" in name
            parameter += torch.randn_like(parameter) * (0.01 if small else 0.2)
    return model
