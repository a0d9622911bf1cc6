"""Small backbones with random weights: one of every causal LM that transformers can build small.

`shrink` knows what configs call their sizes; `SETTINGS` holds what it cannot know. The initial weights are large, so
that wrong positions and masks show in the logits; windows are shorter than the texts; three layers hold every kind of
layer that an architecture has.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from iapt.model.backbone import Backbone

VOCABULARY = 67
WINDOW = 6
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # The usual 0.02 makes a model so linear that wrong positions or masks hardly show.
    **dict.fromkeys(("initializer_range", "init_std", "embed_init_std"), 0.3),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("hidden_dim", "intermediate_size", "ffn_dim", "n_inner", "d_inner", "dff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads",), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "sequence_length"), 128),
}
# What is set where a config has a value of its own, by what that value decides.
_WHERE_SET: dict[str, Any] = {
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), WINDOW),
    "keep_window_size": WINDOW,
    "unpadded_vocab_size": VOCABULARY,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        (
            "num_experts_per_tok",
            "moe_k",
            "moe_topk",
            "num_selected_experts",
            "moe_router_topk",
            "top_k_experts",
            "num_experts_per_token",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "intermediate_size_mlp",
            "expert_ffn_hidden_size",
            "shared_intermediate_size",
            "moe_shared_expert_intermediate_size",
        ),
        24,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_dt_rank", "ssm_state_size", "time_step_rank"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "kv_channels", "lm_head_dim", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "rotary_dim", "global_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    "vocab_size_per_layer_input": VOCABULARY,
}
_LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "attention_layers")

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8}
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Encoders unless told otherwise.
_BERTS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    "reformer",
)
# What one architecture needs beyond its sizes: name -> settings. `_type` is the model type where the name is not;
# None takes a setting away.
SETTINGS: dict[str, dict[str, Any]] = {
    # -- several architectures of one type ---------------------------------------------------------------------
    "falcon": {"alibi": False, "multi_query": True, "new_decoder_architecture": False, "num_kv_heads": None},
    "falcon-alibi": {"_type": "falcon", "alibi": True, "multi_query": False, "new_decoder_architecture": False},
    "falcon-groups": {"_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_bigcode": {"multi_query": True},
    "gpt_bigcode-heads": {"_type": "gpt_bigcode", "multi_query": False},
    "opt-narrow": {"_type": "opt", "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    **{name: {"is_decoder": True} for name in _BERTS},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "big_bird-sparse": {"_type": "big_bird", "is_decoder": True, "attention_type": "block_sparse"},
    **{f"{name}-encoder": {"_type": name, "is_decoder": False} for name in ("bert", "roberta")},
    # -- what a family wants ------------------------------------------------------------------------------------
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "recurrent_gemma": {"w_init_variance_scale": 1.0, "lru_width": 32, "block_types": ["recurrent", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention", "mamba"]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bailing_hybrid": {"kv_lora_rank": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma3n_text": {
        **_SHARED_KEYS,
        "initializer_range": 0.1,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": _SHARED_KEYS,
}
# The config is a wrapper around a text model's: the small text config goes into it.
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": {**_VISION, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
}


def names() -> list[str]:
    """Every causal LM of transformers, and the further architectures of `SETTINGS`."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(n for n in SETTINGS if n not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]


def model_type(name: str) -> str:
    """The model type in transformers of a name of the zoo's."""
    return str(SETTINGS.get(name, {}).get("_type", name))


def is_known(name: str) -> bool:
    """Whether the installed release of transformers has the architecture."""
    return model_type(name) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def small_config(name: str) -> Any:
    """A config of `name`, one of `names()`, as small as it gets."""
    kind = model_type(name)
    whole = AutoConfig.for_model(kind)
    text = whole.get_text_config(decoder=True)
    own = {k: v for k, v in SETTINGS.get(name, {}).items() if k != "_type"}
    settings = {k: v for k, v in {**shrink(text), **own}.items() if v is not None}
    if kind in WRAPPERS:
        return type(whole)(text_config=settings, **WRAPPERS[kind])
    return type(text)(**settings)


def shrink(config: Any) -> dict[str, Any]:
    """Small values for the settings that a default config has."""
    values, renamed = config.to_dict(), getattr(config, "attribute_map", None) or {}
    small = {k: v for k, v in _SIZES.items() if k in values or k in renamed}
    # One name of each aliased pair.
    small = {k: v for k, v in small.items() if renamed.get(k) not in small}
    for key, value in values.items():
        if key in _WHERE_SET and value and not isinstance(value, (bool, list, dict)):
            small[key] = _WHERE_SET[key]
        if key in _LAYER_LISTS and isinstance(value, list) and value:
            small[key] = (list(dict.fromkeys(value)) * 3)[:3]
        if key == "hybrid_layer_ids" and value:
            small[key] = [1]
    if "qk_rope_head_dim" in values:
        small.pop("head_dim", None)
        small["num_key_value_heads"] = 4
    return small


def why_not_small(name: str, largest: int) -> str | None:
    """Why `name` is not built: its config cannot be shrunk, or it has more parameters; None if it can be."""
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(small_config(name))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    size = sum(p.numel() for p in lm.parameters())
    return f"{size:,} parameters with the sizes that are known here" if size > largest else None


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 .. w66, one id each."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def build_lm(name: str, seed: int = 7, **options: Any) -> PreTrainedModel:
    """A random frozen LM in eval mode, the same on every call with the same seed."""
    torch.manual_seed(seed)
    config = small_config(name)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options.setdefault("attn_implementation", "eager")  # in some releases sdpa leaves the soft cap out
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    return lm.eval().requires_grad_(False)


def build(name: str, seed: int = 7, **options: Any) -> Backbone:
    """A random frozen backbone of `name`, one of `names()`."""
    return Backbone(name, build_lm(name, seed, **options), tokenizer())
