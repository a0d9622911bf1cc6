"""ADePT: a short prompt, and offsets that a bottleneck makes of each token."""

from __future__ import annotations

import pytest
import torch

from iapt.config.errors import ConfigError
from iapt.config.schema import Config
from iapt.methods.adept import Adept, AdeptConfig
from iapt.methods.budget import fit_to_budget
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config
from iapt.model.adapted import AdaptedModel
from tests.contracts.conftest import batch, build_backbone, examples

SPEC = METHODS["adept"]


def built(seed: int = 0, **settings) -> Adept:
    torch.manual_seed(seed)
    return SPEC.build(AdeptConfig(name="adept", **settings), build_backbone("llama"))


def test_it_starts_as_prompt_tuning_with_its_prompt():
    method, backbone = built(num_soft_tokens=5, bottleneck=64), build_backbone("llama")
    assert method.prompt.shape == (5, 32)
    assert all((backbone.embeddings.weight == row).all(1).any() for row in method.prompt)
    down, _, _, up = method.offsets
    assert not any(tensor.any() for tensor in (down.bias, up.weight, up.bias))
    assert 0.95 * 32**-0.5 < down.weight.abs().max() <= 32**-0.5
    words = torch.randn(2, 4, 32)
    assert torch.equal(method.edit_embeddings(words, torch.ones(2, 4, dtype=torch.bool)), words)


def test_offsets_follow_the_equation():
    """relu(E[x] A + a) B + b in plain loops, one token at a time."""
    method = built(num_soft_tokens=2, bottleneck=3).double().eval()
    torch.manual_seed(1)
    for parameter in method.parameters():
        parameter.data.normal_()
    words, mask = torch.randn(2, 5, 32, dtype=torch.double), torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    found = method.edit_embeddings(words, mask)
    down, _, _, up = method.offsets
    a_, b_ = down.weight.tolist(), up.weight.tolist()  # torch keeps A and B transposed
    a0, b0 = down.bias.tolist(), up.bias.tolist()
    for row in range(2):
        for column in range(5):
            x = words[row, column].tolist()
            hidden = [max(0.0, sum(a_[k][i] * x[i] for i in range(32)) + a0[k]) for k in range(3)]
            expected = [x[i] + sum(b_[i][k] * hidden[k] for k in range(3)) + b0[i] for i in range(32)]
            torch.testing.assert_close(found[row, column], torch.tensor(expected, dtype=torch.double))


def test_equal_tokens_get_equal_offsets_wherever_they_stand():
    method = built(num_soft_tokens=2, bottleneck=3).eval()
    torch.manual_seed(1)
    for parameter in method.offsets.parameters():
        parameter.data.normal_()
    words = torch.randn(1, 1, 32).expand(1, 4, 32)
    found = method.edit_embeddings(words, torch.ones(1, 4, dtype=torch.bool))
    assert (found - words).abs().max() > 0.1
    torch.testing.assert_close(found, found[:, :1].expand_as(found))


def test_dropout_acts_on_the_hidden_units_in_training_alone():
    method = built(num_soft_tokens=2, bottleneck=8, dropout=0.5)
    torch.manual_seed(1)
    for parameter in method.offsets.parameters():
        parameter.data.normal_()
    method.offsets[0].bias.data.fill_(100.0)  # no unit is off by itself
    words, mask = torch.randn(1, 2, 32), torch.ones(1, 2, dtype=torch.bool)
    method.eval()
    assert torch.equal(method.edit_embeddings(words, mask), method.edit_embeddings(words, mask))
    method.train()
    inner = []
    method.offsets[3].register_forward_pre_hook(lambda module, args: inner.append(args[0]))
    method.edit_embeddings(words, mask)
    assert 0 < int((inner[0] == 0).sum()) < inner[0].numel()


def test_the_bottleneck_has_a_rate_of_its_own():
    model = AdaptedModel(build_backbone("llama"), built(num_soft_tokens=3, bottleneck=2, offset_learning_rate=0.25))
    groups = model.parameter_groups(0.5)
    assert [(g["lr"], sum(p.numel() for p in g["params"])) for g in groups] == [(0.5, 96), (0.25, 2 * 64 + 2 + 32)]


def test_training_moves_every_tensor():
    """The zero start of B keeps A and a still for one step, no longer."""
    model = AdaptedModel(build_backbone("llama"), built(num_soft_tokens=3, bottleneck=4, dropout=0.0))
    start = model.adapter_state()
    optimizer = torch.optim.Adam(model.parameter_groups(1e-2))
    for _ in range(3):
        model.train().loss(batch(examples())).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((tensor != start[name]).all() for name, tensor in model.adapter_state().items())


def test_the_budget_sets_the_bottleneck(llama2_7b):
    chosen, fitted = fit_to_budget(AdeptConfig(name="adept"), llama2_7b, 1_000_000)
    assert (fitted.knob, chosen.bottleneck) == ("bottleneck", fitted.value)
    assert fitted.count == 60 * 4096 + fitted.value * (2 * 4096 + 1) + 4096
    assert abs(fitted.off) < 0.01


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dropout": 1.0}, "method.dropout = 1.0: must be below 1"),
        ({"bottleneck": 0}, "method.bottleneck = 0: must be at least 1"),
    ],
)
def test_bad_settings_are_named(settings: dict, said: str):
    with pytest.raises(ConfigError) as caught:
        load_config({"method": {"name": "adept", **settings}, "task": {"name": "t", "template": "{x}"}}, Config)
    assert said in str(caught.value)
