"""ID-SPAM against its equations, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from iapt.config.errors import ConfigError, UserError
from iapt.config.schema import Config
from iapt.methods.id_spam import IdSpam, IdSpamConfig
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples


def made(**options) -> IdSpam:
    torch.manual_seed(1)
    settings = {"num_soft_tokens": 3, "attention_width": 6, "bottleneck": 4, **options}
    return METHODS["id_spam"].build(IdSpamConfig(name="id_spam", **settings), build_backbone("llama"))


def by_hand(method: IdSpam, states: Tensor, normalize: bool = True) -> Tensor:
    """The real tokens' states (n, d) of one row -> P (s, d)."""
    if normalize:
        states = torch.stack([row / math.sqrt(float((row * row).mean()) + 1e-6) for row in states])
    q, k, v = (states @ m.weight.T for m in (method.queries, method.keys, method.values))
    n, a = q.shape
    attended = []
    for i in range(n):
        weights = torch.stack([torch.exp((q[i] * k[j]).sum() / math.sqrt(a)) for j in range(n)])  # later ones too
        attended.append(sum(weights[j] / weights.sum() * v[j] for j in range(n)))
    pooled = sum(attended) / n
    inner = method.down.weight @ pooled + method.down.bias
    return (method.up.weight @ (inner * (inner > 0)) + method.up.bias).view(3, -1)


@pytest.mark.parametrize("options", [{}, {"attention_width": None}, {"normalize_input": False}])
def test_the_soft_tokens_are_their_equations(options: dict):
    method, states = made(**options), torch.randn(2, 6, 32) * 2
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], dtype=torch.bool)
    states[0, :2] = 100.0  # padding
    found = method(0, states, mask, torch.zeros(2, 3, 32))
    for row in range(2):
        expected = by_hand(method, states[row, mask[row]], options.get("normalize_input", True))
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    assert method.queries.out_features == (options.get("attention_width", 6) or 32)


def test_at_the_input_positions_are_added_and_above_it_nothing_is():
    states, mask, previous = torch.randn(1, 4, 32), torch.ones(1, 4, dtype=torch.bool), torch.randn(1, 3, 32)
    for layer in range(3):
        method = made(layer=layer)
        expected = by_hand(method, states[0]) + (previous[0] if layer == 0 else 0.0)
        torch.testing.assert_close(method(layer, states, mask, previous)[0], expected, rtol=1e-4, atol=1e-5)
        assert all(method(other, states, mask, previous) is None for other in range(3) if other != layer)
        assert method.masked_layers == set(range(layer))


@pytest.mark.parametrize("position", ["before_instruction", "after_instruction"])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_no_layer_below_keeps_a_graph(k: int, position: str):
    model = build_model(Case("id_spam", {"layer": k, "position": position}), "llama").train()
    seen: list[tuple[int, bool]] = []
    for index, layer in enumerate(model.backbone.layers):
        layer.register_forward_hook(lambda m, args, output, i=index: seen.append((i, output.requires_grad)))
    model.loss(batch(examples()))
    # The last three: after the instruction, the frozen prefix runs all layers first.
    assert seen[-3:] == [(i, i >= k) for i in range(3)]


def test_sizes_on_llama2_7b(llama2_7b):
    count, square = METHODS["id_spam"].count, IdSpamConfig(attention_width=None)
    assert count(IdSpamConfig(), llama2_7b) == 3 * 4096 * 64 + 64 * 65 + 40960 * 65
    assert count(square, llama2_7b) == 3 * 4096 * 4096 + 64 * 4097 + 40960 * 65  # 50.3M of them the attention's
    assert IdSpamConfig().size_knob().field == "bottleneck"


def test_bad_settings_are_named():
    with pytest.raises(UserError, match=r"method.layer = 3: .* 3 layers, allowed are 0 to 2"):
        made(layer=3)
    with pytest.raises(ConfigError) as caught:
        load_config({"method": {"name": "id_spam", "layer": -1, "attention_width": 0, "position": "inside"}}, Config)
    for said in (
        "method.layer = -1: must be at least 0",
        "method.attention_width = 0: must be at least 1",
        "method.position = 'inside': allowed are before_instruction, after_instruction",
    ):
        assert said in str(caught.value)
