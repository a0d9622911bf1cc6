"""PARA against a slow computation that writes its vectors into the weights of a copy of the backbone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from iapt.config.errors import ConfigError, UserError
from iapt.config.schema import Config
from iapt.methods.para import ParaConfig
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config
from iapt.model.adapted import AdaptedModel
from iapt.model.method import BiLevel
from iapt.model.mixture import RowMixture
from tests.contracts.conftest import SHAPES, Case, batch, build_backbone, build_model, examples

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def made(shape: str = "llama", **options) -> AdaptedModel:
    """At its start, unlike `build_model`'s."""
    torch.manual_seed(1)
    backbone = build_backbone(shape)
    return AdaptedModel(backbone, METHODS["para"].build(ParaConfig(name="para", **options), backbone))


def vectors(method, index: int, states: Tensor) -> Tensor:
    """The docstring's equations for one instruction: states (n, d) -> 1 + g(q) W_up, all parts side by side."""
    generator, activation = method.generators[index], method.activations[index]
    states = torch.stack([row / math.sqrt(float((row * row).mean()) + 1e-6) for row in states])
    z = states @ generator.down
    weights = torch.exp(z @ generator.query)
    q = (weights * z).sum(0) / weights.sum()
    a, b = activation.numerator.tolist(), activation.denominator.tolist()
    g = sum(a[j] * q**j for j in range(7)) / (1 + abs(sum(b[k] * q ** (k + 1) for k in range(5))))
    return 1 + g @ generator.up


def multiply(module: nn.Module, columns: slice, scale: Tensor) -> None:
    """A linear map's outputs, by its weights; transformers' Conv1D has them the other way round."""
    rows = module.weight if isinstance(module, nn.Linear) else module.weight.T
    rows[columns] *= scale[:, None]
    if module.bias is not None:
        module.bias[columns] *= scale


def maps(shape: str, layer: nn.Module) -> list[tuple[nn.Module, slice]]:
    """Q, V and U by the names that this architecture has for them."""
    if shape == "gpt2":
        return [(layer.attn.c_attn, slice(0, 32)), (layer.attn.c_attn, slice(64, 96)), (layer.mlp.c_fc, slice(0, 128))]
    inner = layer.fc1 if shape == "opt" else layer.mlp.up_proj
    return [(m, slice(0, m.out_features)) for m in (layer.self_attn.q_proj, layer.self_attn.v_proj, inner)]


@torch.no_grad()
def merged(model: AdaptedModel, shape: str, instruction: tuple[int, ...]):
    """A bare LM whose weights hold what PARA says to this instruction: layer by layer, each sees those below."""
    backbone = build_backbone(shape)
    lm, ids = backbone.lm, torch.tensor([instruction])
    for index, layer in enumerate(backbone.layers):
        states = lm(input_ids=ids, output_hidden_states=True).hidden_states[index][0]
        scale, start = vectors(model.method, index, states), 0
        for module, columns in maps(shape, layer):
            end = start + columns.stop - columns.start
            multiply(module, columns, scale[start:end])
            start = end
        assert start == len(scale)
    return lm


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_it_equals_a_backbone_with_its_vectors_in_the_weights(shape: str):
    model, items = build_model(Case("para", {"bottleneck": 6}), shape), examples()
    bare = AdaptedModel(build_backbone(shape), None)
    assert (model.score(batch(items)) - bare.score(batch(items))).abs().max() > 0.1
    scores, steps = model.score(batch(items)), 4
    greedy = model.generate(batch(items), max_new_tokens=steps, min_new_tokens=steps)
    losses = torch.zeros(len(items))
    for row, item in enumerate(items):
        lm, n = merged(model, shape, item.instruction), len(item.instruction)
        for choice, ids in enumerate(item.choices):
            log_p = lm(input_ids=torch.tensor([[*item.instruction, *ids]])).logits[0].log_softmax(-1)
            expected = sum(log_p[n - 1 + i, token] for i, token in enumerate(ids))
            torch.testing.assert_close(scores[row, choice], expected, **TOLERANCE)
        log_p = lm(input_ids=torch.tensor([[*item.instruction, *item.response]])).logits[0].log_softmax(-1)
        losses[row] = -sum(log_p[n - 1 + i, token] for i, token in enumerate(item.response))
        ids = torch.tensor([item.instruction])
        options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
        expected_ids = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(greedy[row], expected_ids[0, n:])
    torch.testing.assert_close(model.loss(batch(items), "sum"), losses.sum(), **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_starts_as_the_bare_backbone_and_all_of_it_learns(shape: str):
    model, bare = made(shape), AdaptedModel(build_backbone(shape), None)
    # Not to the bit: a prefix run with the hooks and a bare one are passes of different shapes.
    torch.testing.assert_close(model.score(batch(examples())), bare.score(batch(examples())), **TOLERANCE)
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.1)
    for _ in range(2):  # in the first step W_up alone, as with LoRA's B
        optimizer.zero_grad()
        model.train().loss(batch(examples())).backward()
        optimizer.step()
    assert not [name for name, p in model.trainable().items() if torch.equal(p, before[name])]


def test_without_normalisation_the_states_go_in_as_they_are():
    method = made(normalize_input=False, activation="identity").method
    with torch.no_grad():
        method.generators[1].up.normal_()
    generator, states = method.generators[1], torch.randn(1, 4, 32) * 3
    mask = torch.tensor([[False, True, True, True]])
    z = states[0, 1:] @ generator.down
    expected = 1 + (torch.softmax(z @ generator.query, 0) * z).sum(0) @ generator.up
    found = method.scale(1, states, mask)
    assert list(found) == ["query", "value", "inner"]
    assert [v.shape for v in found.values()] == [(1, 32), (1, 16), (1, 48)]  # two of four heads have values
    torch.testing.assert_close(torch.cat(list(found.values()), 1)[0], expected)


@pytest.mark.parametrize(
    ("options", "bilevel", "learned"),
    [
        ({"held_out_share": 0.2}, BiLevel("activations.", "train", 0.2), 3),
        ({"activation_training": "joint"}, None, 3),
        ({"activation_training": "frozen"}, None, 0),
        ({"activation": "gelu"}, None, 0),
    ],
)
def test_activation_training(options: dict, bilevel: BiLevel | None, learned: int):
    method = made(activation_learning_rate=7e-5, **options).method
    assert (method.bilevel, method.lr_overrides) == (bilevel, {"activations.": 7e-5})
    assert len([name for name in method.trainable() if name.startswith("activations.")]) == 2 * learned
    config, backbone = ParaConfig(name="para", **options), build_backbone("llama")
    assert sum(p.numel() for p in method.trainable().values()) == METHODS["para"].count(config, backbone)


def test_its_size_on_llama2_7b_is_the_published_one(llama2_7b):
    # 32 (r (d + 1) + r (d + d + 11008) + 12): the paper's "8.9M" are r = 12
    assert METHODS["para"].count(ParaConfig(), llama2_7b) == 8_946_432
    assert ParaConfig().size_knob().field == "bottleneck"


def test_soft_tokens_are_no_setting():
    assert made().method.num_soft_tokens == 0
    assert {"num_soft_tokens", "position"}.isdisjoint(f.name for f in dataclasses.fields(ParaConfig))
    adapters = [made().method, build_model(Case("prompt_tuning", {"num_soft_tokens": 4}), "llama").method]
    with pytest.raises(UserError, match=r"adapters\[1\].num_soft_tokens = 4: .* adapters\[0\] has 0"):
        RowMixture(adapters)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_bad_settings_are_named(share: float):
    settings = {"name": "para", "activation": "swish", "bottleneck": 0}
    with pytest.raises(ConfigError) as caught:
        load_config({"method": settings}, Config)
    assert "method.activation = 'swish': allowed are rational, gelu, relu" in str(caught.value)
    assert "method.bottleneck = 0: must be at least 1" in str(caught.value)
    said = f"method.held_out_share = {share}: must be above 0 and below 1"
    assert ParaConfig(held_out_share=share).problems() == [said]
    assert ParaConfig().problems() == []
