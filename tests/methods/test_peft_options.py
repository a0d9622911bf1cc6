"""Every option of every type of peft's is refused by name, or does what it does under peft itself."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from iapt.methods.peft.method import PeftConfig
from iapt.methods.peft.options import REFUSED, known_types, option_names
from iapt.methods.registry import METHODS
from iapt.model.backbone import Backbone
from tests.contracts.conftest import FAST_TYPES
from tests.methods.peft_samples import BASES, BOOKKEEPING, COMPANIONS, INSTEAD, SAMPLES, TARGETS, TIED, Key

KINDS = [kind for kind, is_prompt in known_types().items() if not is_prompt and kind not in REFUSED]
WALK = [(kind, option) for kind in KINDS for option in sorted(option_names(kind))]
CELLS = [
    pytest.param(kind, option, id=f"{kind}-{option}", marks=[] if kind in FAST_TYPES else [pytest.mark.full])
    for kind, option in WALK
]
STEPS = 6
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
_IDS = torch.randint(3, 67, (3, 9), generator=torch.Generator().manual_seed(1))

Seen = dict[str, Tensor]  # what can be seen of an adapted model, by name


@functools.cache
def _lm(tied: bool) -> PreTrainedModel:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied,
        attention_bias=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    lm = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in lm.named_parameters():
        if name.endswith("bias"):  # which start at zero, where a scaling would not show
            parameter.normal_(std=0.3)
    return lm


def _look(lm: Any, trained: dict[str, nn.Parameter], module: Any, tuner: Any, penalty: Any = None) -> Seen:
    """What is trained, at its start; moved off it, logits; in training mode losses, gradients and AdaLoRA's steps."""
    module.eval()
    seen: Seen = {f"start of {name}": p.detach().clone() for name, p in trained.items()}
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        seen["logits at the start"] = lm(input_ids=_IDS).logits
        for _, parameter in sorted(trained.items()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        seen["logits"] = lm(input_ids=_IDS).logits
    module.train()
    allocator = getattr(tuner, "rankallocator", None)
    for step in range(1, (1 if allocator is None else STEPS) + 1):
        torch.manual_seed(step)
        loss = lm(input_ids=_IDS, labels=_IDS).loss
        added = penalty() if penalty is not None else None
        loss = loss if added is None else loss + added
        loss.backward()
        seen[f"loss {step}"] = loss.detach()
        seen |= {f"gradient {step} of {n}": p.grad.clone() for n, p in trained.items() if p.grad is not None}
        if allocator is not None:
            with torch.no_grad():
                for parameter in trained.values():
                    parameter -= 0.05 * parameter.grad
            module.after_step(step)
            averages = {"importance": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
            seen |= {f"{what} {step} of {n}": t.clone() for what, table in averages.items() for n, t in table.items()}
            for parameter in trained.values():
                parameter.grad = None
    return seen


def ours(kind: str, options: dict[str, Any], tied: bool) -> Seen:
    """Through the method `peft`."""
    backbone = Backbone("tiny", copy.deepcopy(_lm(tied)), None)  # type: ignore[arg-type]
    torch.manual_seed(11)
    method: Any = METHODS["peft"].build(PeftConfig(name="any", type=kind, options=options), backbone)
    method.on_train_start(STEPS)
    return _look(backbone.lm, method.trainable(), method, method._tuner[0], method.penalty)


def pefts(kind: str, options: dict[str, Any], tied: bool) -> Seen:
    """Through peft's own model and configuration."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    scheduled = {"total_step": STEPS} if kind == "ADALORA" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**options, **scheduled, task_type="CAUSAL_LM")
        torch.manual_seed(11)
        model: Any = get_peft_model(copy.deepcopy(_lm(tied)), config)
    trained = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.after_step = getattr(model.base_model, "update_and_allocate", None)
    return _look(model, trained, model, model.base_model)


def difference(a: Seen, b: Seen) -> str | None:
    """The first thing that differs."""
    if set(a) != set(b):
        return f"{sorted(set(a) ^ set(b))[0]} is in one alone"
    for name, tensor in a.items():
        if tensor.shape != b[name].shape or not torch.allclose(tensor, b[name], **TOLERANCE, equal_nan=True):
            return name
    return None


def find(table: dict[Key, Any], kind: str, option: str) -> Any:
    return table.get((kind, option), table.get(option))


def without(kind: str, option: str) -> dict[str, Any]:
    """All that an option needs beside it."""
    targets = {"target_modules": TARGETS} if kind not in ("ADAPTION_PROMPT", "TRAINABLE_TOKENS") else {}
    return {**targets, **BASES.get(kind, {}), **(find(COMPANIONS, kind, option) or {})}


@functools.cache
def _plain(kind: str) -> Seen:
    return ours(kind, without(kind, ""), False)


@pytest.mark.parametrize(("kind", "option"), CELLS)
def test_an_option_does_what_it_does_under_peft_or_is_refused(kind: str, option: str):
    """An option that a new release of peft brings has no value in the samples, and fails here by name."""
    value = find(SAMPLES, kind, option)
    assert value is not None, f"tests/methods/peft_samples.py has no value for {option}, an option of peft's {kind}"
    beside, tied = without(kind, option), option in TIED
    options = {**beside, option: value, **INSTEAD.get((kind, option), {})}
    if problems := PeftConfig(name="any", type=kind, options=options).problems():
        assert len(problems) == 1
        assert f"method.options.{option} = " in problems[0]
        return
    seen = ours(kind, options, tied)
    apart = difference(seen, pefts(kind, options, tied))
    assert apart is None, f"{kind}, {options}: not as under peft: {apart}"
    plain = ours(kind, beside, tied) if tied or find(COMPANIONS, kind, option) else _plain(kind)
    changed, why_not = difference(seen, plain), find(BOOKKEEPING, kind, option)
    if why_not is None:
        assert changed is not None, f"{kind}, {options}: {option} changes nothing"
    else:
        assert changed is None, f"{kind}, {options}: {option} changes {changed}, but {why_not}"


def test_the_samples_hold_what_peft_has():
    """Nothing that a release of peft took away."""
    known = {*WALK, *(option for _, option in WALK)}
    for table in (SAMPLES, COMPANIONS, INSTEAD, BOOKKEEPING):
        assert set(table) <= known, set(table) - known
    assert set(BASES) <= set(KINDS)
    assert known >= TIED
