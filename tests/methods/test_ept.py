"""EPT: DePT's decomposition, prompt fusion and multi-space projection."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from iapt.config.errors import ConfigError
from iapt.config.schema import Config
from iapt.methods.budget import fit_to_budget
from iapt.methods.dept import DeptConfig
from iapt.methods.ept import Ept, EptConfig
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config
from iapt.model.adapted import AdaptedModel
from tests.contracts.conftest import batch, build_backbone, examples

SPEC = METHODS["ept"]
SMALL = {"num_soft_tokens": 3, "rank": 2, "max_offsets": 8, "attention_width": 4, "projection_width": 5}


def built(seed: int = 0, **settings) -> Ept:
    torch.manual_seed(seed)
    return SPEC.build(EptConfig(name="ept", **{**SMALL, **settings}), build_backbone("llama"))


def shaken(method: Ept) -> Ept:
    torch.manual_seed(1)
    for parameter in method.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return method


def test_it_starts_as_prompt_tuning_with_its_prompt():
    method, backbone = built(), build_backbone("llama")
    assert all((backbone.embeddings.weight == row).all(1).any() for row in method.prompt)
    assert torch.equal(method.input_embeddings(), method.prompt)
    words = torch.randn(2, 4, 32)
    assert torch.equal(method.edit_embeddings(words, torch.ones(2, 4, dtype=torch.bool)), words)
    zeros = {name for name, p in method.named_parameters() if not p.any()}
    ups = {f"projection.spaces.{k}.2.{part}" for k in range(4) for part in ("weight", "bias")}
    assert zeros == {"offsets.right", *ups}


def normed(row: list[float]) -> list[float]:
    rms = math.sqrt(sum(x * x for x in row) / len(row) + 1e-6)
    return [x / rms for x in row]


def times(row: list[float], weight: Tensor, bias: Tensor | None = None) -> list[float]:
    """W x (+ b), W (out, in)."""
    out = [sum(w * x for w, x in zip(line, row, strict=True)) for line in weight.tolist()]
    return out if bias is None else [x + b for x, b in zip(out, bias.tolist(), strict=True)]


def softmax(row: list[float]) -> list[float]:
    high = max(row)
    powers = [math.exp(x - high) for x in row]
    return [p / sum(powers) for p in powers]


def test_soft_tokens_follow_the_equations():
    """Fusion and projection in plain loops, one soft token at a time."""
    method = shaken(built(alpha=3.0).double())
    left, right = method.offsets.left.tolist(), method.offsets.right.tolist()
    factor = 3 / math.sqrt(2)
    offsets = [[factor * sum(a[k] * right[k][i] for k in range(2)) for i in range(32)] for a in left]
    found, fusion, projection = method.input_embeddings(), method.fusion, method.projection
    moved = torch.zeros(())
    for index, prompt in enumerate(method.prompt.tolist()):
        query = times(normed(prompt), fusion.query.weight)
        keys = [times(o, fusion.key.weight) for o in offsets]
        values = [times(times(o, fusion.value[0].weight), fusion.value[1].weight) for o in offsets]
        attention = softmax([sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(4) for key in keys])
        fused = [p + sum(a * v[i] for a, v in zip(attention, values, strict=True)) for i, p in enumerate(prompt)]
        gates = softmax(times(normed(fused), projection.gate.weight, projection.gate.bias))
        expected = list(fused)
        for gate, space in zip(gates, projection.spaces, strict=True):
            inner = [max(0.0, x) for x in times(normed(fused), space[0].weight, space[0].bias)]
            expected = [
                e + gate * x for e, x in zip(expected, times(inner, space[2].weight, space[2].bias), strict=True)
            ]
        torch.testing.assert_close(found[index], torch.tensor(expected, dtype=torch.double))
        moved = torch.maximum(moved, (torch.tensor(fused) - torch.tensor(prompt)).abs().max())
    assert moved > 0.01  # or the fusion would go unseen


def test_the_instruction_is_edited_as_by_dept():
    method = shaken(built())
    dept = METHODS["dept"].build(DeptConfig(num_soft_tokens=3, rank=2, max_offsets=8), build_backbone("llama"))
    dept.offsets.load_state_dict(method.offsets.state_dict())
    made = batch(examples())
    words = torch.randn(*made.instruction_ids.shape, 32)
    expected = dept.edit_embeddings(words, made.instruction_mask)
    assert not torch.equal(expected, words)
    assert torch.equal(method.edit_embeddings(words, made.instruction_mask), expected)


def test_all_but_the_prompt_has_a_rate_of_its_own():
    model = AdaptedModel(build_backbone("llama"), built(network_learning_rate=0.25))
    groups = model.parameter_groups(0.5)
    assert [g["lr"] for g in groups] == [0.5, 0.25, 0.25, 0.25]
    assert groups[0]["params"][0] is model.method.prompt
    assert sum(len(g["params"]) for g in groups) == len(model.trainable())


def test_training_moves_every_tensor():
    """Zero starts keep what is multiplied by them still for one step or two, no longer."""
    model = AdaptedModel(build_backbone("llama"), built())
    start = model.adapter_state()
    optimizer = torch.optim.Adam(model.parameter_groups(1e-2))
    for _ in range(4):
        model.train().loss(batch(examples())).backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, tensor in model.adapter_state().items() if torch.equal(tensor, start[name])]
    assert still == []


def test_the_count_and_the_budgets_knob(llama2_7b):
    chosen, fitted = fit_to_budget(EptConfig(name="ept"), llama2_7b, 20_000_000)
    assert (fitted.knob, chosen.projection_width) == ("projection_width", fitted.value)
    assert abs(fitted.off) < 0.01
    for settings in ({"num_spaces": 2}, {"num_spaces": 5, "attention_width": 3}):
        config = EptConfig(name="ept", **{**SMALL, **settings})
        method = SPEC.build(config, build_backbone("llama"))
        assert sum(p.numel() for p in method.parameters()) == SPEC.count(config, build_backbone("llama"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 0}, "method.alpha = 0.0: must be above 0"),
        ({"num_spaces": 1}, "method.num_spaces = 1: must be at least 2"),
    ],
)
def test_bad_settings_are_named(settings: dict, said: str):
    with pytest.raises(ConfigError) as caught:
        load_config({"method": {"name": "ept", **settings}, "task": {"name": "t", "template": "{x}"}}, Config)
    assert said in str(caught.value)
