"""The loop: what a step is, when it stops, and that an interrupted run ends as an uninterrupted one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from iapt.config.errors import TrainingError, UserError
from iapt.config.schema import TrainerConfig
from iapt.data.batch import collate
from iapt.training.phases import protocol_batch_size
from iapt.training.tracking import Tracker
from iapt.training.trainer import Trainer, TrainResult
from tests.contracts.conftest import Case, build_model, examples

IAPT = Case("iapt", {"bottleneck": 8})
PROMPT = Case("prompt_tuning")
SPT = Case("spt", {"bottleneck": 8, "keep": 2})
ITEMS = examples(22)


def make(folder: Path, *, accumulation: int = 1, case: Case = IAPT, **settings: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True)
    defaults = {"max_steps": 12, "batch_size": 8, "eval_every": 4, "learning_rate": 5e-3, "log_every": 1}
    config = TrainerConfig(**{**defaults, **settings})
    model = build_model(case, "llama")
    if case.method == "idpg":
        for module in model.method.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
    tracker = Tracker(folder, accelerator, "test")
    torch.manual_seed(5)
    return Trainer(
        model, config, accelerator, ITEMS, examples(9, seed=8),
        seed=1, folder=folder, tracker=tracker, gradient_accumulation=accumulation,
    )  # fmt: skip


def curve(folder: Path, key: str = "train_loss") -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r[key]) for r in records if key in r]


def test_training_lowers_the_loss_and_keeps_the_best(tmp_path: Path):
    trainer = make(tmp_path, max_steps=40, log_every=10)
    result = trainer.run()
    losses = dict(curve(tmp_path, "dev_loss"))
    assert result.steps == 40
    assert list(losses) == [0, *range(4, 41, 4)]
    assert result.best_dev_loss == min(losses.values()) < losses[0]
    assert losses[result.best_step] == result.best_dev_loss
    assert all(torch.equal(t, result.best[k]) for k, t in trainer.model.adapter_state().items())


def test_step_zero_wins_if_training_brings_nothing(tmp_path: Path):
    result = make(tmp_path, learning_rate=1e-30, max_steps=8, case=PROMPT).run()
    assert result.best_step == 0


def test_patience_stops_the_run(tmp_path: Path):
    result = make(tmp_path, learning_rate=1e-30, max_steps=100, patience=2, case=PROMPT).run()
    assert result.steps == 8


def test_schedule_is_linear_with_warmup(tmp_path: Path):
    make(tmp_path, max_steps=20, warmup_ratio=0.2, eval_every=20).run()
    rates = [rate for _, rate in curve(tmp_path, "learning_rate")]
    expected = [5e-3 * min(step / 4, (20 - step) / 16) for step in range(20)]
    assert rates == pytest.approx(expected)


def test_the_gradients_norm_and_every_groups_rate_are_logged(tmp_path: Path):
    trainer = make(tmp_path / "one", case=PROMPT, max_steps=3, max_grad_norm=1e-3)
    items = trainer.phases[0].batches(0)
    trainer.model.train()
    trainer.model.loss(collate(items, 0)).backward()
    norm = float(trainer.model.method.prompt.grad.norm())  # not that of the gradient as it is clipped
    trainer.optimizer.zero_grad()
    trainer.run()
    found = curve(tmp_path / "one", "gradient_norm")
    assert [step for step, _ in found] == [1, 2, 3]
    assert found[0][1] == pytest.approx(norm, rel=1e-5)
    make(tmp_path / "two", max_steps=4, warmup_ratio=0.0).run()
    rates = [rate for _, rate in curve(tmp_path / "two", "learning_rate/activations.")]
    assert rates == pytest.approx([1e-6 * (4 - step) / 4 for step in range(4)])


def test_own_rates_make_their_own_group(tmp_path: Path):
    groups = make(tmp_path, weight_decay=0.1).groups
    assert [(g["initial_lr"], g["weight_decay"]) for g in groups] == [(5e-3, 0.1), (1e-6, 0.0)]
    assert sum(len(g["params"]) for g in groups) == 3 * 3 + 2 * 3  # three matrices, two coefficient vectors a layer


@pytest.mark.parametrize("accumulation", [2, 3, 8])
def test_accumulated_gradients_equal_one_pass(tmp_path: Path, accumulation: int):
    plain = make(tmp_path / "plain").run()
    parts = make(tmp_path / "parts", accumulation=accumulation).run()
    assert dict(curve(tmp_path / "parts")) == pytest.approx(dict(curve(tmp_path / "plain")), rel=1e-4)
    assert parts.best_dev_loss == pytest.approx(plain.best_dev_loss, rel=1e-4)


# Dropout in one of them: the random state has to be resumed as well. SPT begins anew at step 6.
@pytest.mark.parametrize("case", [IAPT, Case("idpg", {"phm_n": 4}), SPT], ids=lambda c: c.method)
@pytest.mark.parametrize("killed_at", [3, 5, 6, 11])
def test_resumed_equals_uninterrupted(tmp_path: Path, case: Case, killed_at: int):
    def finish(folder: Path) -> TrainResult:
        return make(folder, case=case).run(resume=True)

    whole = make(tmp_path / "whole", case=case).run()
    interrupted = make(tmp_path / "resumed", case=case)
    original = interrupted._train_step

    def die() -> None:
        if interrupted.step == killed_at:
            raise KeyboardInterrupt
        original()

    interrupted._train_step = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    torch.manual_seed(999)
    result = finish(tmp_path / "resumed")
    assert (result.steps, result.best_step) == (whole.steps, whole.best_step)
    assert all(torch.equal(result.best[k], v) for k, v in whole.best.items())
    for key in ("train_loss", "dev_loss", "learning_rate"):
        assert curve(tmp_path / "resumed", key) == curve(tmp_path / "whole", key)


def test_what_may_not_be_kept_is_not_and_wears_no_patience(tmp_path: Path):
    trainer = make(tmp_path / "late", max_steps=40, eval_every=8)
    trainer.method.can_be_checkpoint = lambda step: step in (8, 16)  # type: ignore[method-assign]
    result = trainer.run()
    losses = dict(curve(tmp_path / "late", "dev_loss"))
    assert result.best_dev_loss == min(losses[step] for step in (8, 16, 40)) == losses[result.best_step]
    assert result.best_step in (8, 16, 40)
    idle = {"learning_rate": 1e-30, "max_steps": 100, "patience": 2, "case": PROMPT}
    trainer = make(tmp_path / "idle", **idle)
    trainer.method.can_be_checkpoint = lambda step: step >= 12  # type: ignore[method-assign]
    result = trainer.run()
    assert (result.best_step, result.steps) == (12, 20)


def test_the_last_step_may_always_be_kept(tmp_path: Path):
    trainer = make(tmp_path, max_steps=6)
    trainer.method.can_be_checkpoint = lambda step: False  # type: ignore[method-assign]
    result = trainer.run()
    assert (result.best_step, result.steps) == (6, 6)
    assert all(torch.equal(t, result.best[k]) for k, t in trainer.model.adapter_state().items())


def test_a_resumed_run_does_not_look_at_the_start_again(tmp_path: Path):
    for resume in (False, True):
        trainer = make(tmp_path)
        trainer.method.can_be_checkpoint = lambda step: step > 0  # type: ignore[method-assign]
        trainer._train_step = lambda: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.run(resume=resume)
    assert [step for step, _ in curve(tmp_path, "dev_loss")] == [0]


def test_training_begins_anew_where_a_method_says_so(tmp_path: Path):
    trainer = make(tmp_path, max_steps=20, warmup_ratio=0.2, eval_every=20, case=PROMPT)
    trainer.method.on_phase_change = lambda step: step == 10  # type: ignore[method-assign]
    trainer.run()
    # Two schedules after each other, the optimiser counts from the second one, and the new start is looked at.
    rates = [rate for _, rate in curve(tmp_path, "learning_rate")]
    before = [5e-3 * min(step / 4, (20 - step) / 16) for step in range(10)]
    after = [5e-3 * min(step / 2, (10 - step) / 8) for step in range(10)]
    assert rates == pytest.approx(before + after)
    assert [int(state["step"]) for state in trainer.optimizer.state.values()] == [10]
    assert [step for step, _ in curve(tmp_path, "dev_loss")] == [0, 10, 20]


def test_a_search_ends_in_a_run_of_its_own(tmp_path: Path):
    """SPT: gates learn on held-out batches up to the switch; then the kept generators alone, on all of train."""
    trainer = make(tmp_path, case=SPT, max_steps=12, learning_rate=5e-2)
    start = trainer.model.adapter_state()
    assert [len(phase.parameters) for phase in trainer.phases] == [6, 1]
    result = trainer.run()
    assert [step for step, _ in curve(tmp_path, "dev_loss")] == [0, 4, 6, 8, 12]
    assert [step for step, _ in curve(tmp_path, "held_out_loss")] == [1, 2, 3, 4, 5, 6]
    assert [len(phase.parameters) for phase in trainer.phases] == [4]
    assert sum(len(trainer.phases[0].batches(step)) for step in range(3)) == len(ITEMS)
    assert result.best_step >= 6
    gates, kept = result.best["gates"], result.best["kept"]
    assert not torch.equal(gates, start["gates"])
    assert set(gates.topk(2).indices.tolist()) == set(kept.nonzero().flatten().tolist())
    end = trainer.model.adapter_state()
    for name, tensor in start.items():
        if name.startswith("generators."):
            unchanged = not kept[int(name.split(".")[1])] or result.best_step == 6
            assert torch.equal(end[name], tensor) == unchanged, name


def test_state_disappears_with_the_end(tmp_path: Path):
    trainer = make(tmp_path)
    trainer.run()
    assert (tmp_path / "state" / "latest.pt").exists()
    trainer.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_damaged_state_is_a_clear_error(tmp_path: Path):
    make(tmp_path).run()
    (tmp_path / "state" / "latest.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"latest\.pt: cannot be read"):
        make(tmp_path).run(resume=True)


def test_nan_loss_stops_training_with_a_word(tmp_path: Path):
    trainer = make(tmp_path)
    original = trainer._train_step

    def poison() -> None:
        if trainer.step == 2:
            with torch.no_grad():
                trainer.phases[0].parameters[0].fill_(math.nan)
        original()

    trainer._train_step = poison  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="loss is nan at step 3"):
        trainer.run()


def test_protocol_batch_size():
    assert (protocol_batch_size(9_999), protocol_batch_size(10_000)) == (16, 128)
