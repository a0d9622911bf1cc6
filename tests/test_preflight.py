"""The probe ahead of a run: what is right passes, every break is caught by the check that is meant for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import iapt
from iapt import preflight
from iapt.backbone import Backbone
from iapt.cache import PassCache
from iapt.engine import Engine
from iapt.errors import UserError
from iapt.model import AdaptedModel
from tests.contracts.conftest import CASES, Case, build_backbone, build_model

GATED = Case("iapt", {"bottleneck": 8, "output_start": "gated"})
IAPT = Case("iapt", {"bottleneck": 8, "position": "before_instruction"})


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_what_is_right_passes(case: Case):
    model = build_model(case, "llama")
    figures = preflight.check(model, case.method)
    assert figures["status"] == "passed"
    assert figures["tensors_with_gradient"] > 0 or not model.trainable()


def test_nothing_is_different_behind_it():
    model = build_model(IAPT, "gpt2")
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    preflight.check(model, "iapt")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert not model.training


def no_edit(monkeypatch: pytest.MonkeyPatch, model: AdaptedModel) -> None:
    monkeypatch.setattr(model.engine.hooks, "edit", lambda plan: None)


def cache_that_keeps(monkeypatch: pytest.MonkeyPatch, model: AdaptedModel) -> None:
    start = PassCache.__init__
    monkeypatch.setattr(
        PassCache, "__init__", lambda self, behind, edit=None, keep=False: start(self, behind, edit, True)
    )


def padding_has_positions(monkeypatch: pytest.MonkeyPatch, model: AdaptedModel) -> None:
    forward = type(model.lm.base_model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = torch.ones_like(kwargs["attention_mask"])
        kwargs["position_ids"] = (mask.cumsum(1) - 1)[:, -kwargs["position_ids"].shape[1] :]
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.lm.base_model), "forward", counted)
    monkeypatch.setattr(model.engine, "arguments", model.engine.arguments)


def off_is_on(monkeypatch: pytest.MonkeyPatch, model: AdaptedModel) -> None:
    monkeypatch.setattr(Engine, "_prompt", lambda self: self.method)


def detached(monkeypatch: pytest.MonkeyPatch, model: AdaptedModel) -> None:
    answer = model.method.forward
    monkeypatch.setattr(model.method, "forward", lambda *args: answer(*args).detach())


def nothing_is_written(monkeypatch: pytest.MonkeyPatch, model: AdaptedModel) -> None:
    monkeypatch.setattr(model.method, "forward", lambda *args: None)


def decoding_without_the_plan(monkeypatch: pytest.MonkeyPatch, model: AdaptedModel) -> None:
    monkeypatch.setattr(Engine, "_plan_of_continuation", lambda *args: None)


def library_crash(monkeypatch: pytest.MonkeyPatch, model: AdaptedModel) -> None:
    def crash(*args: Any) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(model.method, "forward", crash)


BREAKS: list[tuple[Callable[..., None], Case, str]] = [
    (no_edit, GATED, r"1 of \d+ trained tensors get no gradient"),
    (cache_that_keeps, IAPT, "encoded and continued"),
    (padding_has_positions, IAPT, "more padding on the left"),
    (off_is_on, IAPT, "switched off"),
    (detached, IAPT, "get no gradient"),
    (nothing_is_written, IAPT, "reach nothing"),
    (decoding_without_the_plan, Case("para", {"bottleneck": 6}), "encoded and continued"),
    (library_crash, IAPT, "IndexError: list index out of range"),
]


@pytest.mark.parametrize(("damage", "case", "words"), BREAKS, ids=lambda x: getattr(x, "__name__", None))
def test_every_break_is_caught(
    damage: Callable[..., None], case: Case, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(case, "gpt2" if damage is padding_has_positions else "llama")
    damage(monkeypatch, model)
    with pytest.raises(UserError, match=words) as caught:
        preflight.check(model, case.method)
    assert "\n" not in str(caught.value)
    assert "preflight=off" in str(caught.value)


def test_a_model_that_looks_ahead_is_refused_by_the_library():
    sizes = {
        "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_range": 0.3, "is_decoder": False,
    }  # fmt: skip
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes))
    with pytest.raises(UserError, match="ahead of a changed token"):
        iapt.attach(lm, {"name": "prompt_tuning"}, tokenizer=build_backbone("llama").tokenizer)
    assert not any(layer._forward_pre_hooks for layer in lm.bert.encoder.layer)


def test_the_tiny_backbone_in_bf16(tmp_path: Any):
    backbone: Backbone = build_backbone("mistral", torch.bfloat16)
    model = iapt.attach(backbone.lm, {"name": "iapt", "bottleneck": 8}, tokenizer=backbone.tokenizer)
    assert preflight.check(model, "iapt")["precision"] == "bfloat16"
