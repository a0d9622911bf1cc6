"""One short training run of a contract cell, and the job that repeats such runs in two processes.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.contracts.training FOLDER

FOLDER/cells.json lists [case id, shape] pairs; rank r leaves FOLDER/r/CELL.pt for each, up to the first that fails,
whose traceback it leaves as FOLDER/r/CELL.error.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from iapt.config.schema import TrainerConfig
from iapt.training.tracking import Tracker
from iapt.training.trainer import Trainer
from tests.contracts.conftest import CASES, Case, build_model, examples

# 11 examples in batches of 5: the epoch's last batch is one example, so with two shares one of them is empty.
STEPS = 4
SETTINGS = {
    "max_steps": STEPS, "batch_size": 5, "eval_every": 2, "log_every": 1, "learning_rate": 5e-3, "warmup_ratio": 0.0,
}  # fmt: skip


def name_of(case: Case, shape: str) -> str:
    """A cell's name, as pytest shows it."""
    return f"{case.id}-{shape}"


def make_trainer(case: Case, shape: str, folder: Path, accumulation: int = 1) -> Trainer:
    """A trainer of the cell, its state and metrics in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(cpu=True)
    model = build_model(case, shape)
    torch.manual_seed(5)
    return Trainer(
        model, TrainerConfig(**SETTINGS), accelerator, examples(11), examples(4, seed=8),
        seed=1, folder=folder, tracker=Tracker(folder, accelerator, "contract"), gradient_accumulation=accumulation,
    )  # fmt: skip


def outcome(trainer: Trainer, *, resume: bool = False) -> dict[str, Any]:
    """Train to the end.

    Returns:
        `losses`: every train, held-out and dev loss by step. `gradients`: the first step's. `adapter`: the last
        step's tensors. `best`: the kept ones.
    """
    method, gradients, adapter = trainer.method, {}, {}
    original = method.after_step

    def after_step(step: int) -> None:
        original(step)
        if step == 1:
            gradients.update({n: p.grad.clone() for n, p in method.trainable().items() if p.grad is not None})
        if step == STEPS:
            adapter.update(trainer.model.adapter_state())

    method.after_step = after_step  # type: ignore[method-assign]
    result = trainer.run(resume=resume)
    losses = {}
    if trainer.accelerator.is_main_process:
        for line in (trainer.folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            losses |= {(record["step"], key): value for key, value in record.items() if key.endswith("_loss")}
    return {"losses": losses, "gradients": gradients, "adapter": adapter, "best": result.best}


def main(folder: Path) -> int:
    """Run every cell of the folder on this rank."""
    torch.set_num_threads(1)
    cases, accelerator = {case.id: case for case in CASES}, Accelerator(cpu=True)
    mine = folder / str(accelerator.process_index)
    mine.mkdir(exist_ok=True)
    for case_id, shape in json.loads((folder / "cells.json").read_text()):
        case = cases[case_id]
        if not build_model(case, shape).trainable():
            continue
        try:
            with tempfile.TemporaryDirectory() as work:
                torch.save(outcome(make_trainer(case, shape, Path(work))), mine / f"{name_of(case, shape)}.pt")
        except Exception:
            # The other rank may be waiting in a collective, so nothing more can be run here.
            (mine / f"{name_of(case, shape)}.error").write_text(traceback.format_exc())
            return 1
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
