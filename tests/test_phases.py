"""Bi-level training: which parameters move on which batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from iapt.config.errors import UserError
from iapt.config.schema import TrainerConfig
from iapt.data.batch import Encoded, collate
from iapt.model.method import BiLevel
from iapt.training.phases import hold_out
from iapt.training.tracking import Tracker
from iapt.training.trainer import Trainer
from tests.contracts.conftest import Case, build_model, examples

TRAIN = examples(40)
DEV = examples(9, seed=8)


def make(folder: Path, bilevel: BiLevel | None, **settings: Any) -> Trainer:
    accelerator = Accelerator(cpu=True)
    config = TrainerConfig(**{"max_steps": 6, "batch_size": 8, "eval_every": 3, "learning_rate": 5e-3, **settings})
    model = build_model(Case("iapt", {"bottleneck": 8}), "llama")
    model.method.bilevel = bilevel
    tracker = Tracker(folder, accelerator, "test")
    return Trainer(model, config, accelerator, TRAIN, DEV, seed=1, folder=folder, tracker=tracker)


def watch(trainer: Trainer) -> list[tuple[set[str], list[Encoded]]]:
    """(the parameters that an optimiser step moved, the examples it saw), one entry a step."""
    found: list[tuple[set[str], list[Encoded]]] = []
    named = dict(trainer.model.trainable())
    before = {name: p.detach().clone() for name, p in named.items()}
    seen: list[Encoded] = []
    instructions = {item.instruction: item for item in [*TRAIN, *DEV]}
    loss = trainer.model.loss

    def watched_loss(batch, *args):
        if torch.is_grad_enabled():
            for ids, mask in zip(batch.instruction_ids, batch.instruction_mask, strict=True):
                seen.append(instructions[tuple(ids[mask].tolist())])
        return loss(batch, *args)

    def after_step(*_: Any) -> None:
        moved = {name for name, p in named.items() if not torch.equal(p, before[name])}
        before.update({name: p.detach().clone() for name, p in named.items()})
        found.append((moved, list(seen)))
        seen.clear()

    trainer.model.loss = watched_loss
    trainer.optimizer.register_step_post_hook(after_step)
    return found


@pytest.mark.parametrize("source", ["train", "dev"])
def test_generators_move_on_train_batches_and_activations_on_held_out_ones(tmp_path: Path, source: str):
    trainer = make(tmp_path, BiLevel("activations.", source, share=0.25))
    steps = watch(trainer)
    trainer.run()
    names = set(trainer.model.trainable())
    activations = {name for name in names if name.startswith("activations.")}
    # The first step's rate is zero: warm-up begins there.
    generator_steps, activation_steps = steps[2::2], steps[3::2]
    assert len(generator_steps) == len(activation_steps) == 5
    assert all(moved == names - activations for moved, _ in generator_steps)
    assert all(moved == activations for moved, _ in activation_steps)
    on_train = {id(item) for _, items in steps[0::2] for item in items}
    on_held_out = {id(item) for _, items in steps[1::2] for item in items}
    assert not on_train & on_held_out
    if source == "dev":
        assert on_held_out == {id(item) for item in DEV}
        assert on_train == {id(item) for item in TRAIN}
    else:
        assert len(on_held_out) == 10
        assert on_train | on_held_out == {id(item) for item in TRAIN}
    assert all(p.requires_grad for p in trainer.model.trainable().values())


def test_joint_training_moves_everything_on_every_batch(tmp_path: Path):
    trainer = make(tmp_path, None)
    steps = watch(trainer)
    trainer.run()
    assert len(steps) == 6
    assert all(moved == set(trainer.model.trainable()) for moved, _ in steps[1:])


def test_a_step_of_each_phase_uses_its_own_gradient_alone(tmp_path: Path):
    """The activation's step is the one of a fresh optimiser on that batch: nothing of the other phase leaks in."""
    trainer = make(tmp_path, BiLevel("activations.", "train", share=0.25), warmup_ratio=0.0)
    train, held_out = trainer.phases
    trainer.step = 0
    trainer._optimise(train)
    expected = build_model(Case("iapt", {"bottleneck": 8}), "llama")
    expected.load_adapter_state(trainer.model.adapter_state())
    names = [name for name in expected.trainable() if name.startswith("activations.")]
    chosen = [expected.trainable()[name] for name in names]
    optimizer = torch.optim.AdamW(chosen, lr=trainer.method.lr_overrides["activations."], weight_decay=0.0)
    expected.train()
    expected.loss(collate(held_out.batches(0), 0)).backward()
    torch.nn.utils.clip_grad_norm_(chosen, trainer.config.max_grad_norm)
    optimizer.step()
    trainer._optimise(held_out)
    for name in names:
        torch.testing.assert_close(trainer.model.trainable()[name], expected.trainable()[name])


def test_bilevel_training_resumes_bit_for_bit(tmp_path: Path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    bilevel = BiLevel("activations.", "train", share=0.25)
    for folder in (whole, cut):
        folder.mkdir()
    expected = make(whole, bilevel).run()
    first = make(cut, bilevel)
    first.total = 3
    first.run()
    result = make(cut, bilevel).run(resume=True)
    assert all(torch.equal(tensor, result.best[name]) for name, tensor in expected.best.items())


def test_hold_out_is_a_partition_and_a_function_of_the_seed():
    rest, share = hold_out(TRAIN, 0.25, seed=1)
    assert (len(rest), len(share)) == (30, 10)
    assert sorted(map(id, rest + share)) == sorted(map(id, TRAIN))
    assert hold_out(TRAIN, 0.25, seed=1) == (rest, share)
    assert hold_out(TRAIN, 0.25, seed=2)[1] != share
    assert [len(part) for part in hold_out(TRAIN[:2], 0.9, seed=1)] == [1, 1]
    assert [len(part) for part in hold_out(TRAIN[:3], 0.01, seed=1)] == [2, 1]
    with pytest.raises(UserError, match="2 are needed"):
        hold_out(TRAIN[:1], 0.5, seed=1)
