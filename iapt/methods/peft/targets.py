"""Which modules of a backbone peft's types adapt, where peft has no default of its own or one that breaks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from iapt.config.errors import UserError
from iapt.methods.peft.options import construct, filled, option_names
from iapt.model.architecture import text_config
from iapt.model.reach import reached

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEYS_VALUES = ("k_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")
_FEEDFORWARD = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "w2")


def with_targets(kind: str, options: dict[str, Any], lm: PreTrainedModel) -> dict[str, Any]:
    """The filled options with the modules to adapt by full names: peft has defaults for some architectures only.

    Raises:
        UserError: if there is nothing to adapt by default.
    """
    options, text = filled(kind, options), _text_modules(lm)
    if kind == "ADAPTION_PROMPT":
        _check_adaption_prompt(lm)
        options.setdefault("adapter_layers", text_config(lm).num_hidden_layers)
        return options
    if kind == "TRAINABLE_TOKENS":  # of the input embeddings, which peft finds
        return options
    asked = options.get("target_modules")
    if isinstance(asked, list | tuple | set) and text_config(lm) is not lm.config:
        # Short names mean the text model's modules; those of other models inside get no gradient from a text.
        asked = [name for name in text if name in asked or name.endswith(tuple(f".{end}" for end in asked))]
        options["target_modules"] = asked or options["target_modules"]  # which peft refuses by name

    def trained(those: Callable[[nn.Module], bool]) -> list[str]:
        return reached(lm, [n for n, m in text.items() if those(m) and m is not lm.get_output_embeddings()])

    if kind == "LN_TUNING":
        if "target_modules" not in options:
            options["target_modules"] = trained(_is_norm)
            if not options["target_modules"]:
                raise UserError(
                    f"method.type = LN_TUNING: the norms of {type(lm).__name__} have no weights to train; LORA and IA3 "
                    "adapt its linear maps"
                )
    elif kind == "IA3":
        asked = options.get("target_modules")
        if asked is None:
            asked = [n for n in trained(is_linear) if n.endswith(_KEYS_VALUES + _FEEDFORWARD)]
            options["target_modules"] = asked
        if not asked:
            raise UserError(
                f"method.options.target_modules = null: found no keys, values or feed-forward of {type(lm).__name__} "
                "under a name that is known; give the names of its linear maps, method.options.feedforward_modules too"
            )
        if not isinstance(asked, str):
            options.setdefault("feedforward_modules", [n for n in asked if n.endswith(_FEEDFORWARD)])
    elif "target_modules" in option_names(kind) and options.get("target_modules", "all-linear") == "all-linear":
        options["target_modules"] = trained(is_linear)
    return options


def _text_modules(lm: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules by name; those of the language model and its head alone where it is one of several inside."""
    modules = dict(lm.named_modules())
    decoder = lm.get_decoder()
    if text_config(lm) is lm.config or decoder is lm:
        return modules
    inside = {id(m) for m in (*decoder.modules(), lm.get_output_embeddings())}
    return {name: m for name, m in modules.items() if id(m) in inside}


def is_linear(module: nn.Module) -> bool:
    """A linear map, GPT-2's kind included."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter)


def _check_adaption_prompt(lm: PreTrainedModel) -> None:
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    if lm.config.model_type not in TRANSFORMERS_MODEL_CONFIG:
        raise UserError(
            f"method.type = ADAPTION_PROMPT: peft has it for {', '.join(sorted(TRANSFORMERS_MODEL_CONFIG))} alone, not "
            f"for {lm.config.model_type!r}; LORA and IA3 adapt it, and method=prefix_tuning is its relative"
        )


def inject(kind: str, options: dict[str, Any], lm: PreTrainedModel) -> Any:
    """Put peft's layers into `lm`; returns peft's object that switches and schedules them.

    Raises:
        UserError: with peft's reason why it cannot, which may be of any type and say little.
    """
    from peft import get_peft_model

    complete = with_targets(kind, options, lm)
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers by a deprecated name, and Conv1D's orientation it settles by itself.
            warnings.simplefilter("ignore")
            return get_peft_model(lm, construct(kind, complete)).base_model
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split()) if isinstance(error, ImportError | TypeError | ValueError) else repr(error)
        raise UserError(f"method.options = {options} with method.type = {kind}: {said}") from error
