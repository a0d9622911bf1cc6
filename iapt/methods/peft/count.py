"""How many parameters a type of peft's trains on a backbone, from the backbone's shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from iapt.config.errors import UserError
from iapt.methods.peft.options import construct
from iapt.methods.peft.targets import inject, is_linear, with_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Options under which the closed forms hold.
_PLAIN = {
    *("target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern"),
    *("r", "init_r", "target_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"),
    *("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "adapter_len", "adapter_layers"),
    *("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights", "init_ia3_weights"),
}


def number_of_parameters(kind: str, options: dict[str, Any], lm: PreTrainedModel) -> int:
    """The number of trained parameters, in closed form where one is known.

    Args:
        kind: peft's type.
        options: as the user sets them.
        lm: only its shapes are read; layers of peft's in it do not count.

    Raises:
        UserError: if peft cannot adapt this model so.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(m, BaseTunerLayer) or hasattr(m, "adaption_prompt") for m in lm.modules()):
        lm = bare_twin(lm)
    closed = closed_form(kind, options, lm)
    return counted(kind, options, lm) if closed is None else closed


def _shape(module: Any) -> tuple[int, int]:
    """(in, out) of a linear map or an embedding."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    rows, columns = module.weight.shape
    return int(rows), int(columns)


# in, out, is it a feed-forward projection (whose input (IA)^3 scales), peft's configuration -> parameters of a module
_PER_MODULE: dict[str, Callable[[int, int, bool, Any], int]] = {
    "LORA": lambda i, o, ff, c: c.r * (i + o) + (o if c.use_dora else 0),
    "ADALORA": lambda i, o, ff, c: c.init_r * (i + o + 1),
    "VERA": lambda i, o, ff, c: c.r + o,
    "IA3": lambda i, o, ff, c: i if ff else o,
}


def closed_form(kind: str, options: dict[str, Any], lm: PreTrainedModel) -> int | None:
    """The number of trained parameters from the shapes of a bare model; None where no formula is known.

    Raises:
        UserError: if nothing in the model has the names to adapt.
    """
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
    from peft.tuners.tuners_utils import check_target_module_exists

    if {key for key, value in options.items() if value is not None} - _PLAIN:
        return None
    complete = with_targets(kind, options, lm)
    if kind == "ADAPTION_PROMPT":
        if lm.config.model_type not in TRANSFORMERS_MODEL_CONFIG:
            return None
        return int(complete["adapter_layers"] * (complete["adapter_len"] * lm.config.hidden_size + 1))
    config = _as_injected(kind, complete, lm)
    if config is None:
        return None
    adapted = [(name, m) for name, m in lm.named_modules() if check_target_module_exists(config, name)]
    parameters = _of_parameters(config, lm)
    if kind not in (*_PER_MODULE, "LN_TUNING"):
        return None
    if not adapted and not parameters:
        raise UserError(f"method.options = {options} with method.type = {kind}: adapts nothing in {type(lm).__name__}")
    if kind == "LN_TUNING":
        return sum(p.numel() for _, m in adapted for p in m.parameters()) or None
    if not all(is_linear(m) or isinstance(m, nn.Embedding) for _, m in adapted):
        return None  # which peft refuses
    if getattr(config, "target_parameters", None) and (config.use_dora or config.lora_dropout):
        return None  # which peft refuses
    feedforward = tuple(complete.get("feedforward_modules", ()))
    modules = sum(_PER_MODULE[kind](*_shape(m), name.endswith(feedforward), config) for name, m in adapted)
    return modules + parameters


def _as_injected(kind: str, options: dict[str, Any], lm: PreTrainedModel) -> Any:
    """peft's configuration as peft itself rewrites it before it adapts a model; None if it cannot.

    Where transformers keeps a layer's experts in one tensor, names like `gate_proj`, which were linear maps of single
    experts once, are taken for that tensor, at a rank of their own.
    """
    config = construct(kind, options)
    if kind == "LORA":
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        try:
            convert_peft_config_for_transformers(config, model=lm, conversions=None)
        except ValueError:  # said well where the layers are injected
            return None
    return config


def _of_parameters(config: Any, lm: nn.Module) -> int:
    """LoRA on tensors of stacked experts (E, in, out), either way round: r E (in + out), E = 1 for a matrix."""
    from peft.utils.other import get_pattern_key

    targets, total = getattr(config, "target_parameters", None) or (), 0
    for name, parameter in lm.named_parameters():
        if name in targets or name.endswith(tuple(f".{target}" for target in targets)):
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
            *experts, i, o = parameter.shape
            total += rank * (experts[0] if experts else 1) * (i + o)
    return total


def counted(kind: str, options: dict[str, Any], lm: PreTrainedModel) -> int:
    """The number of trained parameters, by adapting a copy of the model: without weights where peft can."""
    with torch.random.fork_rng(devices=[]):
        try:
            twin = bare_twin(lm)
            inject(kind, options, twin)
        except UserError:  # some types compute with the weights they find
            twin = bare_twin(lm, "cpu")
            inject(kind, options, twin)
    return sum(p.numel() for p in twin.parameters() if p.requires_grad)


def bare_twin(lm: PreTrainedModel, device: str = "meta") -> PreTrainedModel:
    """A model of the same shapes without adapters, with random weights or, on the meta device, none."""
    with torch.device(device):
        return type(lm)(copy.deepcopy(lm.config)).requires_grad_(False)
