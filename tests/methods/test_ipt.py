"""IPT against its equations, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from iapt.config.errors import ConfigError
from iapt.config.schema import Config
from iapt.methods.ipt import Ipt, IptConfig, first_tokens
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config
from tests.contracts.conftest import build_backbone

ENCODERS = ("identity", "mlp", "lstm")


def made(encoder: str = "identity", **options) -> Ipt:
    torch.manual_seed(1)
    settings = {"num_soft_tokens": 4, "encoder": encoder, "bottleneck": 6, **options}
    return METHODS["ipt"].build(IptConfig(name="ipt", **settings), build_backbone("llama"))


def direction(rows: Tensor, w_in: Tensor, w_hidden: Tensor, b_in: Tensor, b_hidden: Tensor) -> Tensor:
    """One direction of an LSTM over rows (s, r): its outputs (s, r / 2); gates in torch's order i, f, g, o."""
    width = w_hidden.shape[1]
    state, cell, outputs = torch.zeros(width), torch.zeros(width), []
    for row in rows:
        i, f, g, o = (w_in @ row + b_in + w_hidden @ state + b_hidden).split(width)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        state = torch.sigmoid(o) * torch.tanh(cell)
        outputs.append(state)
    return torch.stack(outputs)


def by_hand(method: Ipt, encoder: str, states: Tensor, normalize: bool = True) -> Tensor:
    """The real tokens' states (n, d) of one row -> P (s, d)."""
    rows = []
    for index in range(4):
        if index >= len(states):
            rows.append(method.missing)
            continue
        state = states[index]
        if normalize:
            state = state / math.sqrt(float((state * state).mean()) + 1e-6)
        rows.append(torch.tanh(method.down.weight @ state + method.down.bias))
    table = torch.stack(rows)
    if encoder == "mlp":
        first, _, second = method.encoder
        inner = table @ first.weight.T + first.bias
        table = (inner * (inner > 0)) @ second.weight.T + second.bias
    elif encoder == "lstm":
        weights = list(method.encoder.lstm.parameters())
        forward, backward = direction(table, *weights[:4]), direction(table.flip(0), *weights[4:]).flip(0)
        table = torch.cat([forward, backward], 1)
    return table @ method.up.weight.T + method.up.bias


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_soft_tokens_are_their_equations(encoder: str, normalize: bool):
    method, states, previous = made(encoder, normalize_input=normalize), torch.randn(3, 6, 32), torch.randn(3, 4, 32)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [1] * 6], dtype=torch.bool)  # 2, 4, 6 tokens
    found = method(0, states, mask, previous)
    for row in range(3):
        expected = by_hand(method, encoder, states[row, mask[row]], normalize)
        torch.testing.assert_close(found[row], previous[row] + expected)
    assert method(1, states, mask, previous) is None


@pytest.mark.parametrize("encoder", ENCODERS)
def test_tokens_behind_the_first_s_do_not_matter(encoder: str):
    method, states, blank = made(encoder), torch.randn(1, 6, 32), torch.zeros(1, 4, 32)
    mask = torch.ones(1, 6, dtype=torch.bool)
    found = method(0, states, mask, blank)
    states[:, 4:] += 1
    assert torch.equal(method(0, states, mask, blank), found)
    states[:, 3] += 1
    moved = (method(0, states, mask, blank) - found).abs().amax(-1)[0] > 1e-6
    # Only the LSTM lets one token reach the others' soft tokens.
    assert moved.tolist() == [encoder == "lstm"] * 3 + [True]


def test_first_tokens():
    states = torch.arange(12.0).view(2, 6, 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6], dtype=torch.bool)
    found, there = first_tokens(states, mask, 4)
    assert there.tolist() == [[True, True, True, False], [True] * 4]
    assert found[0, :3, 0].tolist() == [3, 4, 5]
    assert found[1, :, 0].tolist() == [6, 7, 8, 9]
    assert first_tokens(states, mask, 9)[1].sum(1).tolist() == [3, 6]  # more than there are columns


@pytest.mark.parametrize("encoder", ENCODERS)
def test_sizes(encoder: str, llama2_7b):
    config, backbone = IptConfig(encoder=encoder, bottleneck=10), build_backbone("gpt2")
    method = METHODS["ipt"].build(config, backbone)
    assert sum(p.numel() for p in method.parameters()) == METHODS["ipt"].count(config, backbone)
    # At 7B: 2 d r + d + 2 r, and what the encoder adds.
    added = {"identity": 0, "mlp": 2 * 64 * 65, "lstm": 8 * 32 * 98}[encoder]
    config = IptConfig(encoder=encoder)
    assert METHODS["ipt"].count(config, llama2_7b) == 2 * 4096 * 64 + 4096 + 2 * 64 + added
    assert (config.size_knob().field, config.size_knob().step) == ("bottleneck", 2 if encoder == "lstm" else 1)


def test_bad_settings_are_named():
    assert IptConfig(encoder="lstm", bottleneck=7).problems() == [
        "method.bottleneck = 7: must be even, the LSTM's two directions share it"
    ]
    assert IptConfig(encoder="mlp", bottleneck=7).problems() == IptConfig().problems() == []
    with pytest.raises(ConfigError) as caught:
        load_config({"method": {"name": "ipt", "encoder": "cnn", "num_soft_tokens": 0}}, Config)
    assert "method.encoder = 'cnn': allowed are identity, mlp, lstm" in str(caught.value)
    assert "method.num_soft_tokens = 0: must be at least 1" in str(caught.value)
