"""What the method `peft` knows of peft's types: their options, and which of both it refuses.

peft's layers are injected and the backbone's own forward pass runs; `PeftModel.forward` and `generate` never do, nor
does the training loop that peft's documentation asks for. So an option is either all in the layers, or refused here by
name. tests/methods/test_peft_options.py walks every option of every type and holds each against peft itself.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

# Types: what one file of settings cannot give, or what breaks the engine's promises.
REFUSED = {
    "LILY": "its router averages over the whole sequence, so cached decoding would differ from training",
    "POLY": "it routes by task ids, which batches do not carry",
    "SHADOW": "it needs a second model",
    "XLORA": "it mixes adapters that were trained before",
}
_ASA = "peft leaves AdaMSS's schedule to a callback of transformers' trainer"
_DATA_START = (
    "it belongs to a start taken from data or from a quantised backbone, which init_lora_weights cannot name here"
)
_QALORA = "it is for backbones quantised by GPTQ"
_MEGATRON = "it is for Megatron's parallel layers"
_CONVOLUTIONS = "it acts on convolutions, which a language model does not have"
_IGNORED = "peft's {} ignores it"
# Options of any type that has them, unless they have peft's default.
REFUSED_OPTIONS = {
    "alora_invocation_tokens": "peft looks for them in PeftModel.forward and generate, which do not run here",
    "arrow_config": "it routes between adapters that were trained before",
    "asa_importance_beta": _ASA,
    "asa_schedule_exponent": _ASA,
    "asa_target_subspaces": _ASA,
    "asa_uncertainty_beta": _ASA,
    "bias": "it would train the backbone's own biases, which cannot be switched off; method=bitfit trains biases",
    "boft_n_butterfly_factor": "peft sets it to 1 where its CUDA extension is not built",
    "corda_config": _DATA_START,
    "eva_config": _DATA_START,
    "final_warmup": _ASA,
    "init_warmup": _ASA,
    "kasa_config": "it changes the backbone's weights for good, and peft leaves its loss to the training loop",
    "layer_replication": "it changes the backbone's layers, which cannot be switched off",
    "loftq_config": _DATA_START,
    "lora_ga_config": _DATA_START,
    "mask_interval": _ASA,
    "megatron_config": _MEGATRON,
    "megatron_core": _MEGATRON,
    "monteclora_config": "peft leaves its loss to the training loop",
    "psoft_alpha": "peft divides by it what it multiplies with it, so it changes nothing",
    "qalora_group_size": _QALORA,
    "runtime_config": "it says where peft computes while it loads adapters, and peft's loading does not run here",
    "runtime_offload_base_weight": "it moves the backbone's weights off the device",
    "sample_at_inference": "two looks at the same text would score it differently",
    "target_svd_config": _IGNORED.format("OSF"),
    "use_asa": _ASA,
    "use_effective_conv2d": _CONVOLUTIONS,
    "use_qalora": _QALORA,
    "velora_config": "its backward pass depends on earlier batches, which a resumed run does not remember",
}
# Options of one type alone, unless they have peft's default.
_REFUSED_OF_TYPE = {
    **{
        ("ADALORA", name): _IGNORED.format("AdaLoRA")
        for name in ("alpha_pattern", "init_lora_weights", "lora_bias", "use_bdlora", "use_rslora")
    },
    ("ADALORA", "target_parameters"): "peft's AdaLoRA adapts modules alone",
    ("ADALORA", "use_dora"): "peft's AdaLoRA has no magnitudes",
    ("HIRA", "rank_pattern"): _IGNORED.format("HiRA"),
    ("OFT", "module_dropout"): "peft makes this dropout but never applies it",
}
# Set here or by peft itself.
_NOT_OFFERED = {
    *("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"),
    "peft_version",
}
_NOT_OFFERED_TO_ADALORA = {"r", "total_step", "rank_pattern"}  # peft ignores the first
# Where it is not `r`; OFT's settings exclude each other, so it has none.
_SIZES = {"ADALORA": "init_r", "ADAPTION_PROMPT": "adapter_len", "FOURIERFT": "n_frequency", "OFT": ""}
_UNSCHEDULED = 10**9  # peft wants AdaLoRA's number of steps at once; it is known when training starts


def known_types() -> dict[str, bool]:
    """peft's types -> whether they learn soft prompts."""
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {t.value: issubclass(c, PromptLearningConfig) for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def option_names(kind: str) -> set[str]:
    """The fields of a type's configuration that a user may set; empty for an unknown type."""
    return set(_defaults(kind)) - _NOT_OFFERED - (_NOT_OFFERED_TO_ADALORA if kind == "ADALORA" else set())


def _defaults(kind: str) -> dict[str, Any]:
    """The fields of a type's configuration with peft's defaults; empty for an unknown type."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields = [f for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if t.value == kind for f in dataclasses.fields(c)]
    missing = dataclasses.MISSING
    return {f.name: f.default if f.default_factory is missing else f.default_factory() for f in fields}


def refusals(kind: str, options: dict[str, Any]) -> list[str]:
    """One line for every option of a known type that would have no effect here, or one that cannot be undone."""
    defaults, found = _defaults(kind), []
    for name, value in options.items():
        reason = _REFUSED_OF_TYPE.get((kind, name)) or REFUSED_OPTIONS.get(name)
        if (kind, name, value) == ("TINYLORA", "init_weights", False):
            reason = "peft leaves the start to whatever stands in memory; allowed are true and uniform"
        if reason and value is not None and value != defaults.get(name):
            found.append(f"method.options.{name} = {value!r}: not supported for {kind}, {reason}")
    return found


def size_option(kind: str) -> str | None:
    """The option that decides how many parameters are trained, None if there is none."""
    option = _SIZES.get(kind, "r")
    return option if option in option_names(kind) else None


def filled(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are set, and defaults that peft lacks or that would not fit together."""
    options = {key: value for key, value in options.items() if value is not None}
    if kind == "ADALORA":
        options.setdefault("init_r", 12)
        options.setdefault("target_r", max(1, options["init_r"] * 2 // 3))  # b(0) = 1.5 b(T), as its authors have it
    elif kind == "ADAPTION_PROMPT":
        options.setdefault("adapter_len", 10)
    return options


def has_start(options: dict[str, Any]) -> bool:
    """Say whether the adapter starts as a part of W, which peft then takes out of W."""
    init = options.get("init_lora_weights")
    return isinstance(init, str) and (init == "olora" or init.startswith("pissa"))


def construct(kind: str, options: dict[str, Any]) -> Any:
    """peft's configuration object. Raises what peft raises: TypeError, ValueError."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    scheduled = {"total_step": _UNSCHEDULED} if kind == "ADALORA" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Copies, since peft writes into patterns that it is given.
        given = copy.deepcopy(options)
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**given, **scheduled, task_type="CAUSAL_LM")
