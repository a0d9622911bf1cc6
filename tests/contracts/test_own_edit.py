"""A method with an edit of its own, defined here, walks the whole road, and nothing else knows of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iapt
from iapt.config.errors import UserError
from iapt.config.fields import at_least
from iapt.config.method import SoftPromptConfig
from iapt.methods.registry import METHODS, MethodSpec, register
from iapt.model.adapted import AdaptedModel
from iapt.model.architecture import attention_of
from iapt.model.edits.base import Edit, Plan, Site
from iapt.model.edits.layer_input import LayerInput
from iapt.model.edits.rows import Rows, put_rows
from iapt.model.method import SoftPrompt
from iapt.model.mixture import RowMixture
from iapt.runs.experiment import evaluate, run
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples
from tests.test_experiment import config

NAME = "shifted_for_test"
CASE = Case(NAME)
SHAPES = ["llama", "gpt2"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
STEPS = {"max_new_tokens": 5, "min_new_tokens": 5}


class AttentionShift(Edit):
    """Adds a vector to what every layer's attention puts out: one a row, from the instruction's mean state, in all
    columns from the instruction on."""

    reads = "layers"

    def __init__(self, shift: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        self.shift = shift

    def install(self, site: Site) -> None:
        for index, layer in enumerate(site.layers):
            site.after(attention_of(layer), partial(self._add, index))

    def begin(self, plan: Plan) -> None:
        plan.kept[self] = {}

    def before_layer(self, plan: Plan, layer: int, hidden: Tensor) -> Tensor:
        if plan.slots is not None:
            states = plan.read(self.reads, layer, hidden)
            plan.kept[self][layer] = plan.once(self, layer, partial(self.shift, layer, states, plan.mask))
        return hidden

    def _add(self, layer: int, plan: Plan, output: Any) -> Any:
        if (shift := plan.kept.get(self, {}).get(layer)) is None:
            return None
        first, *others = output
        return (first + shift[:, None].to(first.dtype), *others)

    def following(self, kept: dict[int, Tensor]) -> dict[int, Tensor]:
        return kept

    def repeat(self, kept: dict[int, Tensor], copies: int) -> dict[int, Tensor]:
        return {layer: shift.repeat_interleave(copies, 0) for layer, shift in kept.items()}

    @classmethod
    def mix(cls, edits: Sequence[Edit | None], rows: Rows) -> AttentionShift:
        shifts = [edit.shift if isinstance(edit, AttentionShift) else None for edit in edits]

        def shift(layer: int, states: Tensor, mask: Tensor) -> Tensor:
            own = ((one(layer, states[of], mask[of]), of) for one, of in rows.shares(shifts, states))
            return put_rows(torch.zeros_like(states[:, 0]), own)

        return cls(shift)


@dataclasses.dataclass
class ShiftedConfig(SoftPromptConfig):
    num_soft_tokens: int = at_least(3, 1)
    std: float = 0.5


class Shifted(SoftPrompt):
    position = "before_instruction"

    def __init__(self, config: ShiftedConfig, num_layers: int, width: int) -> None:
        super().__init__()
        self.num_soft_tokens = config.num_soft_tokens
        self.prompt = nn.Parameter(torch.randn(config.num_soft_tokens, width) * config.std)
        self.maps = nn.Parameter(torch.randn(num_layers, width, width) * config.std * width**-0.5)

    def edits(self) -> Sequence[Edit]:
        return (AttentionShift(self.shift),)

    def input_embeddings(self) -> Tensor:
        return self.prompt

    def shift(self, layer: int, states: Tensor, mask: Tensor) -> Tensor:
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.tanh(means.to(self.maps.dtype)) @ self.maps[layer]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(
        NAME,
        MethodSpec(
            ShiftedConfig,
            lambda c, b: Shifted(c, b.num_layers, b.hidden_size),
            lambda c, b: c.num_soft_tokens * b.hidden_size + b.num_layers * b.hidden_size**2,
        ),
    )
    yield
    del METHODS[NAME]


def by_hand(model: AdaptedModel, instruction: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """(T, V): the logits that predict `answer`, from one plain pass of a backbone with hooks made here."""
    method, bare = model.method, build_backbone(model.lm.config.model_type)
    words = bare.embed(torch.tensor([[*instruction, *answer]]))
    start, width = method.num_soft_tokens, len(instruction)
    shifts: dict[int, Tensor] = {}

    def look(layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        ones = torch.ones(1, width, dtype=torch.bool)
        shifts[layer] = method.shift(layer, hidden[:, start : start + width], ones)

    def add(layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + shifts[layer][:, None], *output[1:])

    for index, layer in enumerate(bare.layers):
        layer.register_forward_pre_hook(partial(look, index), with_kwargs=True)
        attention_of(layer).register_forward_hook(partial(add, index))
    logits = bare.lm(inputs_embeds=torch.cat([method.input_embeddings()[None], words], 1)).logits[0]
    return logits[-len(answer) - 1 : -1]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_what_hooks_made_by_hand_do(shape: str):
    model, items, losses = build_model(CASE, shape), examples(), []
    scores = model.score(batch(items))
    for row, item in enumerate(items):
        for number, answer in enumerate((*item.choices, item.response)):
            log_p = by_hand(model, item.instruction, answer).log_softmax(-1)
            total = log_p[torch.arange(len(answer)), list(answer)].sum()
            if number < len(item.choices):
                torch.testing.assert_close(scores[row, number], total, **TOLERANCE)
            else:
                losses.append(-total)
    torch.testing.assert_close(model.train().loss(batch(items), "sum"), torch.stack(losses).sum(), **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_keeps_it(shape: str, options: dict[str, Any]):
    """The first of the beams' tokens are the whole pass's, and rows of a padded batch are those alone."""
    model, items = build_model(CASE, shape), examples()
    alone = torch.cat([model.generate(batch([item]), **STEPS, **options) for item in items])
    assert torch.equal(model.generate(batch(items, extra_left=3), **STEPS, **options), alone)
    if not options:
        for item, tokens in zip(items, alone, strict=True):
            assert torch.equal(by_hand(model, item.instruction, tuple(tokens.tolist())).argmax(-1), tokens)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_shares_a_batch_with_others_of_its_kind_and_with_none(shape: str):
    kinds = [CASE, Case(NAME, {"std": 1.0}), Case("prompt_tuning", {"num_soft_tokens": 3})]
    alone, made, rows = [build_model(case, shape) for case in kinds], batch(examples()), [0, 1, 2, 1, 2]
    mixed = AdaptedModel(build_backbone(shape), RowMixture([model.method for model in alone]))
    with mixed.method.serving(rows):
        scores, tokens = mixed.score(made), mixed.generate(made, num_beams=3, **STEPS)
    for row, adapter in enumerate(rows):
        torch.testing.assert_close(scores[row], alone[adapter].score(made)[row], **TOLERANCE)
        assert torch.equal(tokens[row], alone[adapter].generate(made, num_beams=3, **STEPS)[row])


def test_activation_checkpointing_changes_nothing():
    plain, saving = (build_model(CASE, "llama", activation_checkpointing=on) for on in (False, True))
    for model in (plain, saving):
        model.train().loss(batch(examples())).backward()
    for name, parameter in plain.trainable().items():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, saving.trainable()[name].grad, **TOLERANCE)


def test_the_run_of_one_is_like_any_other(tmp_path: Path):
    """Trained behind the preflight, scored and written, then loaded and scored again."""
    summary = run(config(method=NAME), tmp_path / "run")
    assert summary.status == "ok"
    evaluate(tmp_path / "run", tmp_path / "again", {})
    first, second = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("run", "again"))
    assert first == second != ""


def test_it_is_saved_and_loaded_and_not_exported(tmp_path: Path):
    backbone = build_backbone("llama")
    model = iapt.attach(backbone.lm, {"name": NAME}, tokenizer=backbone.tokenizer)
    made = batch(examples())
    model.save(tmp_path / "saved")
    other = build_backbone("llama")
    again = iapt.load(tmp_path / "saved", backbone=other.lm, tokenizer=other.tokenizer)
    assert torch.equal(again.score(made), model.score(made))
    assert torch.equal(again.generate(made, **STEPS), model.generate(made, **STEPS))
    with pytest.raises(UserError, match="Shifted does not fit; what peft can hold"):
        iapt.export_peft(again, tmp_path / "peft")


class Lonely(Edit):
    """Says nothing about batches of several adapters."""


def test_an_edit_that_cannot_be_mixed_is_refused(monkeypatch: pytest.MonkeyPatch):
    methods = [build_model(CASE, "llama").method for _ in range(2)]
    for method in methods:
        monkeypatch.setattr(method, "edits", lambda: (Lonely(),))
    with pytest.raises(UserError, match="Lonely of several adapters cannot share a batch"):
        RowMixture(methods)


def test_two_edits_of_one_kind_are_refused(monkeypatch: pytest.MonkeyPatch):
    method = build_model(CASE, "llama").method
    monkeypatch.setattr(method, "edits", lambda: (LayerInput(method), LayerInput(method)))
    with pytest.raises(ValueError, match=r"Shifted.edits: one kind twice, \['LayerInput', 'LayerInput'\]"):
        RowMixture([method])
