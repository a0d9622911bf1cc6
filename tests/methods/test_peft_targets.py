"""Which modules peft's types adapt on backbones that have more than linear maps in a row, and how many they train."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from iapt.config.errors import UserError
from iapt.methods.peft.count import closed_form
from iapt.methods.peft.method import PeftConfig
from iapt.methods.peft.targets import inject, with_targets
from iapt.methods.registry import METHODS
from tests.backbones import zoo
from tests.backbones.verify import verify

MIXTURES = ("mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MAPS = ["gate_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "all linear": {"r": 3},
    "dora": {"r": 3, "use_dora": True},
    "attention": {"r": 3, "target_modules": ["q_proj", "o_proj"]},
    "experts": {"r": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "names of single experts": {"r": 3, "target_modules": ["q_proj", *MAPS]},
    "mixtral's names": {"r": 3, "target_modules": ["w1", "w2", "w3"]},
    "dora on experts": {"r": 3, "use_dora": True, "target_parameters": EXPERTS},
    "dropout on experts": {"r": 3, "lora_dropout": 0.1, "target_modules": MAPS},
    "a rank of its own": {"r": 3, "rank_pattern": {"down_proj": 5}, "target_modules": MAPS},
    "gates": {"r": 3, "target_modules": ["gate"]},
    "routers": {"r": 3, "target_modules": ["router"]},
    "whole experts": {"r": 3, "target_modules": ["q_proj", "experts"]},
}


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_counts_on_mixtures_are_what_is_trained(options: dict[str, Any], family: str):
    backbone, kept = zoo.build(family), copy.deepcopy(options)
    config = PeftConfig(name="any", type="LORA", options=options)
    try:
        counted: Any = METHODS["peft"].count(config, backbone)
    except UserError:
        counted = "refused"
    try:
        inject("LORA", options, backbone.lm)
        trained: Any = sum(p.numel() for p in backbone.lm.parameters() if p.requires_grad)
    except UserError:
        trained = "refused"
    assert counted == trained
    assert options == kept  # peft writes patterns of its own into what it is given


def test_mixtures_show_both_answers():
    """Else the test above could compare refusals alone."""
    lm = zoo.build_lm("deepseek_v3")
    assert closed_form("LORA", OPTIONS["names of single experts"], lm) == 5184
    with pytest.raises(UserError, match="dora"):
        inject("LORA", OPTIONS["dora on experts"], lm)


@pytest.mark.parametrize(
    ("family", "kind", "left_out"),
    [
        ("gemma3", "LORA", "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("gemma3", "IA3", "model.vision_tower.encoder.layers.0.self_attn.k_proj"),
        ("gemma3", "LN_TUNING", "model.vision_tower.post_layernorm"),
        ("jamba", "LORA", "model.layers.0.mamba.dt_proj"),
        ("axk2", "LORA", "model.layers.0.self_attn.indexer.wq_b"),
        ("axk2", "LN_TUNING", "model.layers.0.input_layernorm"),
        ("deepseek_v32", "LORA", "model.layers.0.self_attn.indexer.weights_proj"),
        ("deepseek_v32", "LN_TUNING", "model.layers.0.self_attn.indexer.k_norm"),
        ("gemma4_text", "LN_TUNING", "model.layers.0.self_attn.v_norm"),
        ("llama4_text", "LORA", "model.layers.0.feed_forward.router"),
    ],
)
def test_what_gets_no_gradient_is_left_alone(family: str, kind: str, left_out: str):
    lm = zoo.build_lm(family)
    assert left_out in dict(lm.named_modules())
    adapted = with_targets(kind, {}, lm)["target_modules"]
    assert adapted
    assert left_out not in adapted
    assert METHODS["peft"].count(PeftConfig(name="any", type=kind), zoo.build(family)) == _trained(kind, lm)


def _trained(kind: str, lm: Any) -> int:
    inject(kind, {}, lm)
    return sum(p.numel() for p in lm.parameters() if p.requires_grad)


@pytest.mark.parametrize("variant", ["LoRA", "(IA)3", "layer norm tuning"])
@pytest.mark.parametrize("family", ["gemma3", "jamba", "axk2", "deepseek_v32", "bamba", "phimoe"])
def test_defaults_are_right_on_odd_backbones(family: str, variant: str):
    cell = verify(family, variant)
    assert cell.status == "right", cell.detail


def test_short_names_mean_the_text_model():
    lm = zoo.build_lm("gemma3")
    named = with_targets("LORA", {"target_modules": ["q_proj", "lm_head"]}, lm)["target_modules"]
    assert named == [*(f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(3)), "lm_head"]
    with pytest.raises(UserError, match="nowhere"):
        inject("LORA", {"target_modules": ["nowhere"]}, lm)


@pytest.mark.parametrize(
    ("family", "kind", "said"),
    [
        ("olmo", "LN_TUNING", "the norms of OlmoForCausalLM have no weights to train; LORA and IA3"),
        ("nanochat", "LN_TUNING", "the norms of NanoChatForCausalLM have no weights"),
        ("gemma3", "ADAPTION_PROMPT", "peft has it for gpt2, llama, mistral alone, not for 'gemma3'; LORA and IA3"),
        ("bert", "IA3", "found no keys, values or feed-forward of BertLMHeadModel"),
    ],
)
def test_refusals_say_what_works_there(family: str, kind: str, said: str):
    with pytest.raises(UserError) as caught:
        inject(kind, {}, zoo.build_lm(family))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
