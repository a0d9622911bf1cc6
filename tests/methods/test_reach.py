"""Trained tensors go where a text's gradient passes through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from iapt.config.errors import UserError
from iapt.methods.registry import METHODS
from iapt.model.reach import reached
from tests.backbones import zoo


def linears(lm: nn.Module) -> list[str]:
    return [name for name, module in lm.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("llama", set()),
        ("gemma3", {"vision_tower"}),  # no text runs through it
        ("jamba", {"dt_proj"}),  # its weight is read, the module never called
        ("deepseek_v32", {"indexer"}),  # it only selects
        ("llama4_text", {"router"}),  # gives two tensors
    ],
)
def test_what_texts_do_not_train_is_left_out(name: str, left_out: set[str]):
    lm = zoo.build_lm(name)
    names = linears(lm)
    found = reached(lm, names)
    dropped = [name for name in names if name not in found]
    assert bool(dropped) == bool(left_out)
    assert all(any(part in name for part in left_out) for name in dropped)
    assert not any(part in name for part in left_out for name in found)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3", "ctrl"])
def test_shapes_alone_will_do(name: str):
    lm = zoo.build_lm(name)
    with torch.device("meta"):
        bare = type(lm)(lm.config).eval().requires_grad_(False)
    assert reached(bare, linears(bare)) == reached(lm, linears(lm))


def test_biases_of_recurrent_layers_are_refused():
    with pytest.raises(UserError, match=r"BitFit's biases act on padding too, and layers of BambaForCausalLM"):
        METHODS["bitfit"].build(METHODS["bitfit"].config(name="bitfit"), zoo.build("bamba"))
