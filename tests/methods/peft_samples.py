"""A value other than peft's default for every option of every type of peft, and what the option needs beside it.

An option that is missing here fails `test_every_option_has_a_sample`: look at what it does, then add it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import peft
from peft.tuners.lora import config as lora

# Sizes under which a type fits the small llama: widths 32, 16 and 48.
SIZES: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2},
    "C3A": {"block_size": 16},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "TRAINABLE_TOKENS": {"token_indices": [3, 5]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 20},
}


@dataclass(frozen=True)
class Sample:
    """`value` of an option, compared with the same configuration without it.

    `beside` stands in both, `together` in the first alone: what the option cannot be set without.
    """

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)
    together: dict[str, Any] = field(default_factory=dict)


# What holds for every type that has the option.
COMMON: dict[str, Sample] = {
    "target_modules": Sample(["q_proj", "v_proj"]),
    "exclude_modules": Sample(["q_proj"]),
    "modules_to_save": Sample(["lm_head"]),
    "layers_to_transform": Sample([1]),
    "layers_pattern": Sample("blocks", {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]}),
    "r": Sample(2),
    "bias": Sample("all"),
    "fan_in_fan_out": Sample(True),
    "init_weights": Sample(False),
    "alpha": Sample(3),
    "rank_pattern": Sample({"q_proj": 2}),
    "alpha_pattern": Sample({"q_proj": 3}),
    "module_dropout": Sample(0.5),
    "rank_dropout": Sample(0.5),
    "scaling": Sample(7.0),
    "projection_prng_key": Sample(5),
    "save_projection": Sample(False),
    "random_seed": Sample(5),
    "random_loc_seed": Sample(5),
    "use_rslora": Sample(True),
    "lora_alpha": Sample(3),
    "lora_dropout": Sample(0.5),
    "d_initial": Sample(0.3),
    "use_effective_conv2d": Sample(True),
    "init_lora_weights": Sample("gaussian"),
    "n_frequency": Sample(10),
    "n_frequency_pattern": Sample({"q_proj": 10}),
    # LoRA's, which AdaLoRA inherits
    "megatron_config": Sample({}),
    "megatron_core": Sample("megatron"),
    "trainable_token_indices": Sample([3, 5]),
    "loftq_config": Sample({"loftq_bits": 4}),
    "eva_config": Sample(lora.EvaConfig()),
    "corda_config": Sample(lora.CordaConfig()),
    "lora_ga_config": Sample(lora.LoraGAConfig()),
    "use_dora": Sample(True),
    "velora_config": Sample({"num_groups": 4}),
    "alora_invocation_tokens": Sample([3]),
    "use_qalora": Sample(True),
    "qalora_group_size": Sample(8),
    "monteclora_config": Sample({}),
    "layer_replication": Sample([[0, 2], [1, 3]]),
    "runtime_config": Sample(lora.LoraRuntimeConfig(ephemeral_gpu_offload=True)),
    "lora_bias": Sample(True),
    "target_parameters": Sample(["q_proj.weight"], {"target_modules": ["v_proj"]}),
    "use_bdlora": Sample({"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}),
    "arrow_config": Sample({}),
    "kasa_config": Sample({}),
    "ensure_weight_tying": Sample(True),
}
# What holds for one type.
OWN: dict[tuple[str, str], Sample] = {
    ("ADALORA", "init_r"): Sample(6),
    ("ADALORA", "target_r"): Sample(3),
    ("ADALORA", "tinit"): Sample(3),
    ("ADALORA", "tfinal"): Sample(3),
    ("ADALORA", "deltaT"): Sample(2),
    ("ADALORA", "beta1"): Sample(0.1),
    ("ADALORA", "beta2"): Sample(0.1),
    ("ADALORA", "orth_reg_weight"): Sample(5.0),
    ("ADAMSS", "r"): Sample(4),
    ("ADAMSS", "num_subspaces"): Sample(3),
    ("ADAMSS", "subspace_rank"): Sample(2),
    ("ADAMSS", "use_asa"): Sample(
        True, {"asa_target_subspaces": 3, "init_warmup": 1, "final_warmup": 4, "mask_interval": 1}
    ),
    ("ADAPTION_PROMPT", "target_modules"): Sample("mlp"),
    ("ADAPTION_PROMPT", "adapter_len"): Sample(3),
    ("ADAPTION_PROMPT", "adapter_layers"): Sample(2),
    ("ADAMSS", "use_dynamic_rank"): Sample(True),
    ("ADAMSS", "svd_threshold"): Sample(0.5, {"use_dynamic_rank": True}),
    ("BOFT", "boft_block_size"): Sample(8),
    ("BOFT", "boft_block_num"): Sample(4, together={"boft_block_size": 0}),
    ("BOFT", "boft_n_butterfly_factor"): Sample(2),
    ("BOFT", "boft_dropout"): Sample(0.5),
    ("C3A", "block_size"): Sample(8),
    ("C3A", "block_size_pattern"): Sample({"q_proj": 8}),
    ("C3A", "init_weights"): Sample("gaussian"),
    ("DEFT", "decomposition_method"): Sample("qr"),
    ("DEFT", "init_scale"): Sample(3.0),
    ("DEFT", "para"): Sample(True),
    ("DEFT", "deft_dropout"): Sample(0.5),
    ("DELORA", "delora_lambda"): Sample(3),
    ("DELORA", "lambda_pattern"): Sample({"q_proj": 3}),
    ("FROD", "frod_dropout"): Sample(0.5),
    ("FROD", "sparse_rate"): Sample(0.2),
    ("FROD", "regularization_alpha"): Sample(0.5),
    ("FROD", "progressbar"): Sample(False),
    ("FROD", "runtime_offload_base_weight"): Sample(True),
    ("FOURIERFT", "init_weights"): Sample(True),
    ("GLORA", "config_A_B"): Sample("vector"),
    ("GLORA", "config_C"): Sample("vector"),
    ("GLORA", "config_D_E"): Sample("vector"),
    ("GRALORA", "hybrid_r"): Sample(2),
    ("GRALORA", "gralora_dropout"): Sample(0.5),
    ("GRALORA", "gralora_k"): Sample(4),
    ("HIRA", "hira_dropout"): Sample(0.5),
    ("HRA", "apply_GS"): Sample(True),
    ("IA3", "target_modules"): Sample(["k_proj", "down_proj"], {"feedforward_modules": ["down_proj"]}),
    ("IA3", "feedforward_modules"): Sample(["k_proj"], {"target_modules": ["k_proj", "v_proj"]}),
    ("IA3", "exclude_modules"): Sample(["v_proj"]),
    ("IA3", "init_ia3_weights"): Sample(False),
    ("LN_TUNING", "target_modules"): Sample(["input_layernorm"]),
    ("LN_TUNING", "exclude_modules"): Sample(["input_layernorm"]),
    ("LOKR", "decompose_both"): Sample(True, {"r": 1, "decompose_factor": 4}),
    ("LOKR", "decompose_factor"): Sample(4),
    ("LOKR", "rank_dropout_scale"): Sample(True, {"rank_dropout": 0.5}),
    ("LOKR", "init_weights"): Sample("lycoris"),
    ("MISS", "miss_dropout"): Sample(0.5),
    ("MISS", "mini_r"): Sample(2, {"init_weights": "mini"}),
    ("MISS", "init_weights"): Sample("bat"),
    ("OFT", "r"): Sample(2, together={"oft_block_size": 0}),
    ("OFT", "oft_block_size"): Sample(4),
    ("OFT", "coft"): Sample(True),
    ("OFT", "eps"): Sample(1e-3, {"coft": True}),
    ("OFT", "block_share"): Sample(True),
    ("OFT", "use_cayley_neumann"): Sample(False),
    ("OFT", "num_cayley_neumann_terms"): Sample(2),
    ("OSF", "effective_rank"): Sample(3),
    ("OSF", "rank_pattern"): Sample({"q_proj": 3}),
    ("OSF", "target_svd_config"): Sample({"q_proj": 3}),
    ("PEANUT", "depth"): Sample(2),
    ("PEANUT", "act_fn"): Sample("tanh"),
    ("PSOFT", "psoft_alpha"): Sample(3),
    ("PSOFT", "psoft_dropout"): Sample(0.5),
    ("PSOFT", "ab_svd_init"): Sample("pissa_init"),
    ("PSOFT", "psoft_svd"): Sample("lowrank"),
    ("PSOFT", "psoft_svd_lowrank_niter"): Sample(1, {"psoft_svd": "lowrank"}),
    ("PSOFT", "psoft_orth"): Sample(False),
    ("PSOFT", "psoft_mag_a"): Sample(False),
    ("PSOFT", "psoft_mag_b"): Sample(False),
    ("PSOFT", "use_cayley_neumann"): Sample(True),
    ("PSOFT", "num_cayley_neumann_terms"): Sample(2, {"use_cayley_neumann": True}),
    ("PSOFT", "cayley_neumann_eps"): Sample(0.05, {"use_cayley_neumann": True}),
    ("PSOFT", "random_seed"): Sample(5, {"psoft_svd": "lowrank"}),
    ("PVERA", "pvera_dropout"): Sample(0.5),
    ("PVERA", "sample_at_inference"): Sample(True),
    ("PVERA", "generator_seed"): Sample(5),
    ("RANDLORA", "sparse"): Sample(True),
    ("RANDLORA", "very_sparse"): Sample(True),
    ("RANDLORA", "randlora_dropout"): Sample(0.5),
    ("RANDLORA", "randlora_alpha"): Sample(20),
    ("ROAD", "variant"): Sample("road_2"),
    ("ROAD", "group_size"): Sample(4),
    ("SHIRA", "mask_type"): Sample("top"),
    ("SHIRA", "r"): Sample(4),
    ("SUPERTUNING", "r"): Sample(4),
    ("SUPERTUNING", "lora_alpha"): Sample(3.0, {"r": 4}),
    ("SUPERTUNING", "lora_dropout"): Sample(0.5, {"r": 4}),
    ("SUPERTUNING", "sparsity"): Sample(0.5),
    ("SUPERTUNING", "select_top"): Sample(False),
    ("SUPERTUNING", "save_precomputed_indices"): Sample(False),
    ("TINYLORA", "u"): Sample(8),
    ("TINYLORA", "r"): Sample(3),
    ("TINYLORA", "weight_tying"): Sample(1.0),
    ("TINYLORA", "projection_seed"): Sample(5),
    ("TINYLORA", "init_v_bound"): Sample(0.5, {"init_weights": False}),
    ("TINYLORA", "tinylora_dropout"): Sample(0.5),
    ("TRAINABLE_TOKENS", "token_indices"): Sample([4]),
    ("TRAINABLE_TOKENS", "target_modules"): Sample(["embed_tokens"]),
    ("UNILORA", "proj_seed"): Sample(5),
    ("UNILORA", "theta_d_length"): Sample(64),
    ("UNILORA", "unilora_dropout"): Sample(0.5),
    ("UNILORA", "init_theta_d_bound"): Sample(0.5),
    ("UNILORA", "save_indices"): Sample(True),
    ("VBLORA", "num_vectors"): Sample(6),
    ("VBLORA", "vector_length"): Sample(8),
    ("VBLORA", "topk"): Sample(3),
    ("VBLORA", "save_only_topk_weights"): Sample(True),
    ("VBLORA", "vblora_dropout"): Sample(0.5),
    ("VBLORA", "init_vector_bank_bound"): Sample(0.5),
    ("VBLORA", "init_logits_std"): Sample(0.9),
    ("VERA", "vera_dropout"): Sample(0.5),
    ("WAVEFT", "wavelet_family"): Sample("db2"),
    ("WAVEFT", "use_idwt"): Sample(False),
    ("WAVEFT", "proportional_parameters"): Sample(True),
}
_PRUNED = {"use_asa": True, "asa_target_subspaces": 3, "init_warmup": 1, "final_warmup": 4, "mask_interval": 1}
for _name, _value in {
    "asa_target_subspaces": 50, "init_warmup": 2, "final_warmup": 6, "mask_interval": 2,
    "asa_importance_beta": 0.1, "asa_uncertainty_beta": 0.1, "asa_schedule_exponent": 1.0,
}.items():  # fmt: skip
    OWN["ADAMSS", _name] = Sample(_value, _PRUNED)
# Of every configuration alike, and none of an adapter's own.
SHARED = {f.name for f in fields(peft.PeftConfig)}


def sample(kind: str, name: str) -> Sample | None:
    """The sample for an option of a type, None if nobody has looked at it."""
    return OWN.get((kind, name)) or COMMON.get(name)
