"""Adapters to and from peft: input-level soft prompts as PROMPT_TUNING, and LORA.

A folder of peft's holds adapter_config.json and adapter_model.safetensors. Prompts are one tensor there,
`prompt_embeddings` (s, d); what a reparametrisation trained behind it (P-tuning's encoder) does not travel. A LoRA's
tensors stand under the names that peft gives them, copies of whole modules (`modules_to_save`) under the modules' own.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import peft
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict, load_peft_weights
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iapt.api import attach
from iapt.config.errors import UserError
from iapt.methods.peft.method import Peft, PeftConfig
from iapt.model.adapted import AdaptedModel
from iapt.model.method import SoftPrompt
from iapt.runs.restore import put_back

PREFIX = "base_model.model."  # what peft puts before the names of an LM's modules
EXPORTED = (
    "what peft can hold are soft prompts that enter as input embeddings before the instruction and are the same for "
    "every instruction, and methods of type LORA without init_lora_weights = pissa or olora"
)
# The others change the backbone's weights as well, or freeze a half of the adapter.
STARTS = (True, False, "gaussian", "orthogonal", "eva")
_START_ALONE = ("init_lora_weights", "eva_config")  # of no effect once an adapter is trained


def export_peft(model: AdaptedModel, folder: str | Path) -> None:
    """Write the adapter so that `PeftModel.from_pretrained(lm, folder)` computes the same.

    A prompt is written as it stands in eval mode, with a warning: peft keeps padding on the left between the
    prompt and the text, so its results are right for right-padded batches only.

    Args:
        model: prompt tuning, or another prompt that is nothing but input embeddings; or a LoRA.
        folder: made if missing; an adapter of peft's in it is replaced.

    Raises:
        UserError: for any other method.
    """
    method, lm = model.method, model.lm
    if isinstance(method, SoftPrompt) and (prompt := _input_prompt(method)) is not None:
        config: Any = peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=len(prompt),
            token_dim=prompt.shape[1],
            num_layers=lm.config.num_hidden_layers,
            num_attention_heads=lm.config.num_attention_heads,
            num_transformer_submodules=1,
        )
        tensors = {"prompt_embeddings": prompt}
        warnings.warn(
            "peft's soft prompts give wrong results under left padding (padding stands between prompt and text there): "
            "use the exported adapter with right-padded batches, or one row at a time",
            stacklevel=2,
        )
    elif isinstance(method, Peft) and lm.peft_config["default"].peft_type == "LORA" and not len(method.starts):
        config = copy.copy(lm.peft_config["default"])
        found = get_peft_model_state_dict(lm, save_embedding_layers=False)
        # Copies, since a file holds tied tensors twice.
        tensors = {PREFIX + name: tensor.detach().cpu().clone().contiguous() for name, tensor in found.items()}
    else:
        name = "the bare backbone" if method is None else type(method).__name__
        raise UserError(f"export_peft: {name} does not fit; {EXPORTED}")
    config.inference_mode = True
    config.base_model_name_or_path = lm.config.name_or_path or None
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(path)


def import_peft(
    folder: str | Path, *, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> AdaptedModel:
    """Attach an adapter that peft made: PROMPT_TUNING and P_TUNING as `prompt_tuning`, LORA as the method `peft`.

    Args:
        folder: local; peft does not say which weights it was trained on, so only names and shapes are checked.
        backbone: the LM; it is changed as `attach` changes it.
        tokenizer: as in `attach`.

    Raises:
        UserError: a folder that is not peft's, another type, an option that would have no effect here, tensors that do
            not fit, and all that `attach` raises.
    """
    path = Path(folder)
    weights = [path / SAFETENSORS_WEIGHTS_NAME, path / WEIGHTS_NAME]
    # Without these files peft would ask the hub for a repository of the folder's name.
    if not (path / "adapter_config.json").is_file() or not any(w.is_file() for w in weights):
        raise UserError(f"folder = {path}: expected adapter_config.json and {SAFETENSORS_WEIGHTS_NAME}, as peft saves")
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
        tensors: dict[str, Tensor] = load_peft_weights(str(path), device="cpu")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"folder = {path}: cannot be read: {error}") from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"folder = {path}: task_type = {task}; allowed are CAUSAL_LM and none")
    if kind in ("PROMPT_TUNING", "P_TUNING"):
        settings, state = _prompt_settings(config, tensors, path)
        model = attach(backbone, settings, tokenizer=tokenizer)
    elif kind == "LORA":
        model = attach(backbone, _lora_settings(config, path), tokenizer=tokenizer)
        state = _lora_state(model, tensors, path)
    else:
        raise UserError(f"folder = {path}: peft_type = {kind}; allowed are PROMPT_TUNING, P_TUNING and LORA")
    put_back(model, state, f"folder = {path}")
    return model


@torch.no_grad()
def _input_prompt(method: SoftPrompt) -> Tensor | None:
    """(s, d) float32 on the CPU, if that is all the method ever does to a pass."""
    if method.position != "before_instruction" or method.edits():
        return None
    if method.scores_labels:  # by a head of its own, say
        return None
    was = method.training
    method.eval()
    try:
        prompt = method.input_embeddings()
    finally:
        method.train(was)
    return None if prompt is None else prompt.detach().float().cpu().clone().contiguous()


def _prompt_settings(config: Any, tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    prompt = tensors.get("prompt_embeddings")
    if prompt is None:
        raise UserError(f"folder = {path}: holds no prompt_embeddings")
    if len(tensors) > 1:  # of modules_to_save, say
        others = ", ".join(sorted(set(tensors) - {"prompt_embeddings"})[:6])
        raise UserError(
            f"folder = {path}: a prompt is all that can be read; this one was trained together with {others}"
        )
    if len(prompt) != config.num_virtual_tokens:
        raise UserError(f"folder = {path}: num_virtual_tokens = {config.num_virtual_tokens}, prompt of {len(prompt)}")
    return {"name": "prompt_tuning", "num_soft_tokens": len(prompt), "init": "random"}, {"prompt": prompt}


def _lora_settings(config: Any, path: Path) -> dict[str, Any]:
    """A LoRA of peft's as settings of the method `peft`: what differs from peft's defaults."""
    if config.init_lora_weights not in STARTS:
        raise UserError(
            f"folder = {path}: init_lora_weights = {config.init_lora_weights!r} changes the backbone's weights too; "
            "have peft save it with path_initial_model_for_weight_conversion"
        )
    common = {f.name for f in dataclasses.fields(peft.PeftConfig)}
    default = type(config)()
    options = {
        f.name: _plain(getattr(config, f.name))
        for f in dataclasses.fields(config)
        if f.name not in common.union(_START_ALONE) and getattr(config, f.name) != getattr(default, f.name)
    }
    if problems := PeftConfig(name="lora", type="LORA", options=options).problems():
        raise UserError(f"folder = {path}: {'; '.join(problems)}")
    return {"name": "lora", "kind": "peft", "type": "LORA", "options": options}


def _lora_state(model: AdaptedModel, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a LoRA of peft's under the names of the method that is attached to `model`.

    peft also saves embeddings that it adapted; those must be the backbone's.
    """
    assert isinstance(model.method, Peft)
    lm = model.lm
    # Adapters of experts were one by one before transformers 5.
    tensors = convert_peft_adapter_state_dict_for_transformers(lm, lm.peft_config["default"], tensors)
    names = _own_names(model.method, lm)
    state = {own: tensors[name] for name, own in names.items() if name in tensors}
    for name in sorted(set(tensors) - set(names)):
        own = name.removeprefix(PREFIX)
        weight = _weight(lm, own)
        if weight is None:
            state[own] = tensors[name]  # which `put_back` names
        elif not _same(weight, tensors[name]):
            raise UserError(
                f"folder = {path}: its {own} differs from this backbone's, so it was trained on another one, or on one "
                "with tokens of its own"
            )
    return state


def _own_names(method: Peft, lm: PreTrainedModel) -> dict[str, str]:
    """Names in peft's files -> names in the method."""
    own = {_place(parameter): name for name, parameter in method.trainable().items()}
    saved = get_peft_model_state_dict(lm, save_embedding_layers=False)
    return {PREFIX + name: own[_place(tensor)] for name, tensor in saved.items()}


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Where a tensor lies, and how: a head's LoRA that is tied to the embeddings' is the same memory, transposed."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _weight(lm: PreTrainedModel, name: str) -> Tensor | None:
    """A frozen weight of the backbone by the name it has beside peft's layers, None if it has none."""
    try:
        weight = lm.get_parameter(name)
    except AttributeError:
        return None
    return None if weight.requires_grad else weight.detach()


def _same(weight: Tensor, saved: Tensor) -> bool:
    """Whether two tensors are one, as far as the shorter of their dtypes can tell."""
    dtype = max(weight.dtype, saved.dtype, key=lambda d: torch.finfo(d).eps)
    return weight.shape == saved.shape and torch.equal(weight.cpu().to(dtype), saved.cpu().to(dtype))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, set) else value
