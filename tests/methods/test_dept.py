"""DePT: a short prompt, and offsets by position."""

from __future__ import annotations

import math

import pytest
import torch

from iapt.config.errors import ConfigError
from iapt.config.schema import Config
from iapt.methods.budget import fit_to_budget
from iapt.methods.dept import Dept, DeptConfig
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config
from iapt.model.adapted import AdaptedModel
from tests.contracts.conftest import batch, build_backbone, examples

SPEC = METHODS["dept"]


def built(seed: int = 0, **settings) -> Dept:
    torch.manual_seed(seed)
    return SPEC.build(DeptConfig(name="dept", **settings), build_backbone("llama"))


def test_it_starts_as_prompt_tuning_with_its_prompt():
    method, backbone = built(num_soft_tokens=5, rank=4), build_backbone("llama")
    rows = [(backbone.embeddings.weight == row).all(1).any() for row in method.prompt]
    assert method.prompt.shape == (5, 32)
    assert all(rows)  # each is some token's embedding
    assert method.prompt.unique(dim=0).shape[0] > 1
    assert (method.offsets.left.shape, method.offsets.right.shape) == ((256, 4), (4, 32))
    assert not method.offsets.right.any()
    assert 0.45 < method.offsets.left.abs().max() <= 0.5  # uniform within 1 / sqrt(4)
    assert method.offsets.left.mean().abs() < 0.05
    tuned = METHODS["prompt_tuning"].config(num_soft_tokens=5)
    plain = METHODS["prompt_tuning"].build(tuned, backbone)
    plain.prompt.data.copy_(method.prompt.data)
    scores = [AdaptedModel(build_backbone("llama"), m).score(batch(examples())) for m in (method, plain)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)  # of the two, one computes offsets that are zero


@pytest.mark.parametrize("length", [1, 4, 20])
def test_offsets_follow_the_equation(length: int):
    """c A B in plain loops, one token at a time; instructions of 2 to 11 tokens, so some are longer than `length`."""
    method = built(num_soft_tokens=2, rank=3, max_offsets=length, alpha=6.0).double()
    torch.manual_seed(1)
    method.offsets.right.data.normal_()
    made = batch(examples(), extra_left=2)
    words = torch.randn(*made.instruction_ids.shape, 32, dtype=torch.double)
    found = method.edit_embeddings(words, made.instruction_mask)
    left, right = method.offsets.left.tolist(), method.offsets.right.tolist()
    for row, mask in enumerate(made.instruction_mask.tolist()):
        position = 0
        for column, real in enumerate(mask):
            expected = words[row, column].tolist()
            if real and position < length:
                for i in range(32):
                    expected[i] += 6 / math.sqrt(3) * sum(left[position][k] * right[k][i] for k in range(3))
            torch.testing.assert_close(found[row, column], torch.tensor(expected, dtype=torch.double))
            position += real


def test_the_offsets_have_a_rate_of_their_own():
    model = AdaptedModel(build_backbone("llama"), built(num_soft_tokens=3, rank=2, offset_learning_rate=0.25))
    groups = model.parameter_groups(0.5, weight_decay=0.1)
    assert [(g["lr"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.5, [(3, 32)]),
        (0.25, [(256, 2), (2, 32)]),
    ]


def test_training_moves_every_tensor():
    """The zero start of B keeps A still for one step, no longer."""
    model = AdaptedModel(build_backbone("llama"), built(num_soft_tokens=3, rank=2, max_offsets=8))
    start = model.adapter_state()
    optimizer = torch.optim.Adam(model.parameter_groups(1e-2))
    for _ in range(3):
        model.train().loss(batch(examples())).backward()
        optimizer.step()
        optimizer.zero_grad()
    # Every row of A that some instruction reaches.
    moved = {name: (tensor != start[name]).any(-1) for name, tensor in model.adapter_state().items()}
    assert all(rows.all() for rows in moved.values())


def test_the_budget_sets_the_rank(llama2_7b):
    chosen, fitted = fit_to_budget(DeptConfig(name="dept"), llama2_7b, 1_000_000)
    assert (fitted.knob, chosen.rank) == ("rank", fitted.value)
    assert fitted.count == 40 * 4096 + fitted.value * (256 + 4096)
    assert abs(fitted.off) < 0.01


def test_the_authors_sizes_share_one_budget():
    """(m, r) of the authors on T5-base: m d + r (S + d) is near 100 d for each."""
    for m, r in ((40, 45), (60, 30), (80, 15)):
        assert m * 768 + r * (256 + 768) == pytest.approx(100 * 768, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 0}, "method.alpha = 0.0: must be above 0"),
        ({"rank": 0}, "method.rank = 0: must be at least 1"),
        ({"max_offsets": 0}, "method.max_offsets = 0: must be at least 1"),
        ({"position": "after_instruction"}, "method.position = 'after_instruction': unknown key"),
    ],
)
def test_bad_settings_are_named(settings: dict, said: str):
    with pytest.raises(ConfigError) as caught:
        load_config({"method": {"name": "dept", **settings}, "task": {"name": "t", "template": "{x}"}}, Config)
    assert said in str(caught.value)
