"""What is particular to one method; what holds for all of them is in tests/contracts."""

from __future__ import annotations

import pytest
import torch

from iapt.config.errors import UserError
from iapt.config.method import MethodConfig
from iapt.methods.iapt import IaptConfig
from iapt.methods.idpg import IdpgConfig
from iapt.methods.peft.method import PeftConfig
from iapt.methods.prompt_tuning import PromptTuningConfig
from iapt.methods.registry import METHODS, MethodSpec, register
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import Backbone
from iapt.model.method import SoftPrompt
from tests.contracts.conftest import batch, build_backbone, examples


@pytest.mark.parametrize(
    ("bottleneck", "expected"),
    # 32 (2 d r + 4 r) + 384: 83.93M at r = 320 ("83.9M" in MiLoRA's table), and smaller budgets
    [(320, 83.93e6), (256, 67.1e6), (128, 33.6e6), (64, 16.8e6), (32, 8.4e6)],
)
def test_iapt_has_the_published_size(llama2_7b: Backbone, bottleneck: int, expected: float):
    count = METHODS["iapt"].count(IaptConfig(name="iapt", bottleneck=bottleneck), llama2_7b)
    assert count == pytest.approx(expected, rel=2e-3)


def test_lora_has_the_published_size(llama2_7b: Backbone):
    # r = 32 on the seven linear maps, 79.95M ("80.0M" in MiLoRA's table)
    config = PeftConfig(name="lora", type="LORA", options={"r": 32})
    assert METHODS["peft"].count(config, llama2_7b) == pytest.approx(79.95e6, rel=1e-3)


def test_prompt_tuning_starts():
    backbone = build_backbone("llama")
    build = METHODS["prompt_tuning"].build
    text = PromptTuningConfig(name="prompt_tuning", num_soft_tokens=5, init="text", init_text="w9 w4")
    table = backbone.embeddings.weight
    assert torch.equal(build(text, backbone).prompt, table[torch.tensor([9, 4, 9, 4, 9])])
    vocabulary = build(PromptTuningConfig(name="prompt_tuning", num_soft_tokens=6, init="vocabulary"), backbone)
    assert all((row == table).all(1).any() for row in vocabulary.prompt)
    random = build(PromptTuningConfig(name="prompt_tuning", num_soft_tokens=200, init="random", init_std=0.3), backbone)
    assert float(random.prompt.std()) == pytest.approx(0.3, rel=0.05)
    empty = PromptTuningConfig(name="prompt_tuning", init="text", init_text=" ")
    with pytest.raises(UserError, match="method.init_text"):
        build(empty, backbone)
    assert PromptTuningConfig(name="prompt_tuning", init="text").problems()


def test_phm_width_is_checked():
    with pytest.raises(UserError, match=r"method.phm_n = 12.*width 32"):
        METHODS["idpg"].build(IdpgConfig(name="idpg", bottleneck=12, phm_n=12), build_backbone("llama"))
    assert IdpgConfig(name="idpg", bottleneck=10, phm_n=16).problems()


def test_lora_without_a_target_is_refused():
    config = PeftConfig(name="lora", type="LORA", options={"target_modules": ["nope"]})
    with pytest.raises(UserError, match=r"method.options = .*nope"):
        METHODS["peft"].build(config, build_backbone("llama"))


def test_after_the_instruction_no_prefix_state_needs_gradient(monkeypatch: pytest.MonkeyPatch):
    """The frozen prefix: with soft tokens behind it, the instruction runs without gradient and is not run again."""
    backbone = build_backbone("llama")
    for position, expected in (("after_instruction", False), ("before_instruction", True)):
        config = IaptConfig(name="iapt", bottleneck=8, position=position)
        model = AdaptedModel(backbone, METHODS["iapt"].build(config, backbone))
        widths: list[tuple[int, bool]] = []
        handle = backbone.layers[1].register_forward_hook(
            lambda m, args, output, seen=widths: seen.append((output.shape[1], output.requires_grad))
        )
        made = batch(examples())
        model.loss(made)
        handle.remove()
        model.detach()
        columns, response = made.instruction_ids.shape[1], made.response_ids.shape[1]
        if expected:
            assert widths == [(4 + columns + response - 1, True)]
        else:
            assert widths == [(columns, False), (4 + 1 + response - 1, True)]


def test_logits_are_computed_for_response_positions_only():
    backbone = build_backbone("llama")
    model = AdaptedModel(backbone, None)
    rows: list[int] = []
    backbone.lm.lm_head.register_forward_hook(lambda m, args, output: rows.append(output.shape[1]))
    made = batch(examples())
    model.loss(made)
    model.score(made)
    assert rows == [made.response_ids.shape[1]] + [made.choice_ids.shape[2]] * 3


def test_a_method_can_come_from_outside():
    """A dummy method, registered here, walks the same road: engine, verbs, saving."""

    class Constant(SoftPrompt):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.num_soft_tokens, self.position = 2, "before_instruction"
            self.value = torch.nn.Parameter(torch.ones(2, width))

        def forward(self, layer, states, mask, previous):
            return self.value.expand(len(states), -1, -1)

    spec = MethodSpec(MethodConfig, lambda c, b: Constant(b.hidden_size), lambda c, b: 2 * b.hidden_size)
    register("constant_for_test", spec)
    try:
        backbone = build_backbone("gpt2")
        model = AdaptedModel(backbone, METHODS["constant_for_test"].build(MethodConfig(), backbone))
        model.loss(batch(examples())).backward()
        assert model.score(batch(examples())).shape == (5, 3)
        assert list(model.adapter_state()) == ["value"]
        with pytest.raises(ValueError, match="registered twice"):
            register("constant_for_test", spec)
    finally:
        del METHODS["constant_for_test"]
