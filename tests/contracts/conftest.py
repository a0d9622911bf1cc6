"""Small random backbones of several architectures, and every method in the variants that take other roads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from iapt.data.batch import Batch, Encoded, collate
from iapt.methods.post import Post
from iapt.methods.registry import METHODS
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import Backbone

VOCABULARY = 67
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # The usual 0.02 makes a model so linear that wrong positions or masks hardly show.
    "initializer_range": 0.3,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen2": _SIZES,
    # Windows and soft caps small enough to matter within a few tokens.
    "gemma2": {**_SIZES, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "mistral": {**_SIZES, "sliding_window": 6},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    },
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "init_std": 0.3,
    },
}
VARIANT_SHAPES = ("llama", "gpt2")  # rotary and learned positions; the roads through the engine differ no further
# Of peft's types, one that adapts linear maps, one that scales what they put out, one for norms, one for attention.
FAST_TYPES = (None, "LORA", "IA3", "LN_TUNING", "ADAPTION_PROMPT")


@dataclass(frozen=True)
class Case:
    """A method and the settings under which it is held to the contract.

    `impossible`: shape -> why the method cannot exist on it. `also`: methods that build this very model, and differ in
    what they make of the task.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return "-".join([self.method, *(str(v) for v in self.options.values())])


# A method's first line runs on all shapes, its further ones (other roads through the engine) on VARIANT_SHAPES; without
# `--full` the first lines run, on VARIANT_SHAPES.
# A registered method that is missing here fails test_every_method_is_covered.
CASES = [
    Case("prompt_tuning", {"position": "before_instruction"}),
    Case("prompt_tuning", {"position": "after_instruction"}),
    Case("idpg", {"layers": "multi", "projection": "phm", "sharing": "layer_bias", "phm_n": 4}),
    Case("idpg", {"layers": "multi", "projection": "dense", "sharing": "none", "pooling": "mean"}),
    Case("idpg", {"layers": "single", "projection": "dense"}),
    Case("idpg", {"layers": "single", "projection": "phm", "position": "after_instruction", "phm_n": 4}),
    Case("p_tuning", {"encoder": "lstm"}),
    Case("p_tuning", {"encoder": "mlp", "position": "after_instruction", "encoder_width": 10}),
    Case("prefix_tuning", {"form": "keys_values", "reparameterization": "mlp", "mlp_width": 6}),
    Case("prefix_tuning", {"form": "keys_values", "reparameterization": "none", "position": "after_instruction"}),
    Case("prefix_tuning", {"form": "states", "reparameterization": "projected", "low_dim": 6}),
    Case("lpt", {"generator": "naive", "bottleneck": 8}),
    Case("lpt", {"generator": "pooling", "reduce": "max", "layer": 2, "position": "after_instruction"}),
    Case("lopa", {"rank": 2, "head_width": 8}),
    Case("id_spam", {"num_soft_tokens": 5, "attention_width": 6, "bottleneck": 8}),
    Case("id_spam", {"layer": 2, "position": "after_instruction", "attention_width": None, "bottleneck": 8}),
    # Some instructions of every mixture are shorter than 6 tokens.
    Case("ipt", {"encoder": "mlp", "num_soft_tokens": 6, "bottleneck": 8}),
    Case("ipt", {"encoder": "lstm", "num_soft_tokens": 6, "position": "after_instruction", "bottleneck": 8}),
    Case("ipt", {"encoder": "identity", "num_soft_tokens": 6, "bottleneck": 8}),
    Case("para", {"bottleneck": 6}),
    Case("para", {"activation": "tanh", "bottleneck": 6}),
    # Some instructions are longer than 6 tokens, and rows of one batch end at different positions.
    Case("dept", {"num_soft_tokens": 3, "rank": 2, "max_offsets": 6}),
    Case("adept", {"num_soft_tokens": 3, "bottleneck": 4}),
    Case("ept", {"num_soft_tokens": 3, "rank": 2, "max_offsets": 6, "attention_width": 4, "projection_width": 4}),
    Case("ptec", {"label_words": ("w3", "w4", "w5"), "num_soft_tokens": 4}),
    Case("ptec", {"label_words": ("w3", "w4", "w5"), "num_soft_tokens": 4, "position": "after_instruction"}),
    Case("sciprompt", {"label_words": ("w3", "w4", "w5"), "num_soft_tokens": 4}),
    Case("sciprompt", {"label_words": ("w3", "w4", "w5"), "num_soft_tokens": 4, "position": "after_instruction"}),
    Case("panda", {"num_soft_tokens": 4, "weight": 1.0}),
    Case("panda", {"num_soft_tokens": 4, "schedule": "warmup_decay", "position": "after_instruction"}),
    Case("post", {"num_soft_tokens": 4}),
    Case("post", {"num_soft_tokens": 4, "alpha": 0.8, "position": "after_instruction"}),
    Case("peft", {"type": "LORA"}),
    Case("peft", {"type": "LORA", "options": {"use_dora": True}}),
    Case("peft", {"type": "LORA", "options": {"init_lora_weights": "pissa"}}),
    Case("peft", {"type": "ADALORA"}),
    Case("peft", {"type": "VERA"}),
    Case("peft", {"type": "IA3"}),
    Case("peft", {"type": "LN_TUNING"}),
    Case(
        "peft",
        {"type": "ADAPTION_PROMPT"},
        impossible=dict.fromkeys(("qwen2", "gemma2", "opt"), "peft has LLaMA-Adapter for llama, mistral and gpt2"),
    ),
    Case("zero_shot", also=("in_context",)),
    Case("calibrated"),
    Case("houlsby", {"bottleneck": 6}),
    Case("parallel_adapter", {"bottleneck": 6}),
    Case("bitfit", {}),
    Case("full", {}),
    Case("iapt", {"position": "before_instruction", "bottleneck": 8}),
    Case("iapt", {"position": "after_instruction", "bottleneck": 8}),
    Case("spt", {"bottleneck": 8}),
    Case("spt", {"bottleneck": 8, "layers": [1]}),
    Case("spt", {"bottleneck": 8, "layers": [0, 2], "reduce": "max", "position": "after_instruction"}),
    Case(
        "iapt", {"position": "before_instruction", "bottleneck": 8, "share_every": 2, "activation_training": "frozen"}
    ),
    Case(
        "iapt",
        {"bottleneck": 8, "output_start": "gated", "pooling": "mean", "activation": "relu", "upper_activation": "gelu"},
    ),
]


def _cells() -> list[tuple[Case, str]]:
    return [(c, s) for c in CASES for s in SHAPES if is_first(c) or s in VARIANT_SHAPES]


def is_first(case: Case) -> bool:
    """Whether no case before it is of its family."""
    return case is next(c for c in CASES if family(c) == family(case))


def family(case: Case) -> tuple[str, str | None]:
    """Cases that share code: the method, and peft's type where the method is peft."""
    return case.method, case.options.get("type")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "shape"} <= set(metafunc.fixturenames):
        cells = [pytest.param(c, s, id=f"{c.id}-{s}", marks=_marks(c, s)) for c, s in _cells()]
        metafunc.parametrize(("case", "shape"), cells)
    elif "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=lambda c: c.id)


def _marks(case: Case, shape: str) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.skip(case.impossible[shape])] if shape in case.impossible else []
    fast = is_first(case) and shape in VARIANT_SHAPES and case.options.get("type") in FAST_TYPES
    return marks if fast else [*marks, pytest.mark.full]


def build_backbone(shape: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Backbone:
    """A random frozen backbone, the same on every call; `changes` of its config."""
    torch.manual_seed(7)
    # Of the two, transformers has eager alone for Gemma2, whose logits are capped.
    attention = "eager" if shape == "gemma2" else "sdpa"
    config = AutoConfig.for_model(shape, **{**SHAPES[shape], **changes})
    lm = (
        AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        .to(dtype)
        .eval()
        .requires_grad_(False)
    )
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    return Backbone(shape, lm, tokenizer)


def build_model(case: Case, shape: str, **options: Any) -> AdaptedModel:
    """The case on a shape, its trained tensors moved off their start so that nothing is a no-op by accident.

    `seed` decides all that is drawn; the other options are AdaptedModel's, and the backbone's dtype.
    """
    backbone = build_backbone(shape, options.pop("dtype", torch.float32))
    spec = METHODS[case.method]
    config = spec.config(name=case.method, **case.options)
    if hasattr(config, "dropout"):
        config.dropout = 0.0  # equalities are tested, in train mode too
    torch.manual_seed(options.pop("seed", 11))
    model = AdaptedModel(backbone, spec.build(config, backbone), **options)
    with torch.no_grad():
        for name, parameter in model.trainable().items():
            small = "activations" in name or "norm" in name
            parameter += torch.randn_like(parameter) * (0.01 if small else 0.2)
    if isinstance(model.method, Post):
        model.method.learn_from(build_model(Case("prompt_tuning", {"num_soft_tokens": 3}), "gpt2", seed=5), backbone)
    model.method.fit(model, [batch(examples(8, seed=21))])
    return model


def examples(count: int = 5, seed: int = 3) -> list[Encoded]:
    """Instructions of 2 to 11 tokens, responses of 1 to 4, three choices."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    return [
        Encoded(i, (1, *draw(1 + (i * 7) % 11)), draw(1 + i % 4), (draw(1), draw(2), draw(3)), label=i % 3)
        for i in range(count)
    ]


def batch(items: list[Encoded], extra_left: int = 0, extra_right: int = 0) -> Batch:
    """Collated, with superfluous padding columns if asked."""
    made = collate(items, 0)

    def pad(ids: torch.Tensor, left: int, right: int) -> torch.Tensor:
        return torch.nn.functional.pad(ids, (left, right), value=0)

    assert made.choice_ids is not None
    assert made.choice_mask is not None
    return Batch(
        pad(made.instruction_ids, extra_left, 0),
        pad(made.instruction_mask, extra_left, 0),
        pad(made.response_ids, 0, extra_right),
        pad(made.response_mask, 0, extra_right),
        pad(made.choice_ids, 0, extra_right),
        pad(made.choice_mask, 0, extra_right),
        made.indices,
        made.labels,
    )
