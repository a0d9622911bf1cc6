"""Two processes equal one at the same global batch; so does a sharded backbone. On CPU, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iapt.runs.hardware import cores
from iapt.runs.launch import launch
from tests.test_experiment import config
from tests.test_trainer import curve

WORKER = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from iapt.model.backbone import shard_layers
from iapt.config.task import TaskConfig
from iapt.evaluation.evaluate import mean_loss, _classify, _over_examples
from iapt.data.task import Example
from tests.test_trainer import make
from tests.contracts.conftest import Case, examples

torch.set_num_threads(1)
folder, method, strategy = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
options = {"bottleneck": 8, "position": sys.argv[4]} if method == "iapt" else {"type": "LORA"}
trainer = make(folder, case=Case(method, options), max_steps=6, eval_every=3, batch_size=7)
if strategy == "fsdp":
    shard_layers(trainer.model.backbone, trainer.model.trainable().values())
result = trainer.run()
task = TaskConfig(label_column="label", label_words=["a", "b", "c"])
predict = _classify(trainer.model, task, [Example("", "")] * 9)
records = _over_examples(trainer.model, examples(9, seed=8), 2, trainer.accelerator, predict)
if trainer.accelerator.is_main_process:
    torch.save({"best": result.best, "scores": [r["scores"] for r in records]}, folder / "result.pt")
trainer.accelerator.end_training()
"""


def run(folder: Path, processes: int, *arguments: str) -> dict:
    folder.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path.cwd()),
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(torch.load(folder / "result.pt"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "strategy", "position"),
    [
        ("iapt", "ddp", "before_instruction"),
        ("iapt", "fsdp", "after_instruction"),
        ("peft", "fsdp", "-"),
    ],
)
def test_two_processes_equal_one(tmp_path: Path, method: str, strategy: str, position: str):
    one = run(tmp_path / "one", 1, method, "ddp", position)
    two = run(tmp_path / "two", 2, method, strategy, position)
    for key in ("train_loss", "dev_loss"):
        assert dict(curve(tmp_path / "two", key)) == pytest.approx(dict(curve(tmp_path / "one", key)), rel=1e-4)
    for name, tensor in one["best"].items():
        torch.testing.assert_close(two["best"][name], tensor, rtol=1e-3, atol=1e-4)
    assert len(one["scores"]) == 9
    torch.testing.assert_close(torch.tensor(two["scores"]), torch.tensor(one["scores"]), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(cores() < 2, reason="two processes need two cores")
@pytest.mark.parametrize(
    ("toy", "method", "strategy"),
    [("entailment", "iapt", "ddp"), pytest.param("describe", "lora", "fsdp", marks=pytest.mark.full)],
)
def test_two_processes_equal_one_from_config_to_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: str, method: str, strategy: str
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = launch(config(toy, method), tmp_path / "one")
    hardware = {"device": "cpu", "num_processes": 2, "strategy": strategy}
    two = launch(config(toy, method, hardware=hardware), tmp_path / "two")
    assert (one.num_processes, two.num_processes) == (1, 2)
    for key in ("train_loss", "dev_loss"):
        assert dict(curve(tmp_path / "two", key)) == pytest.approx(dict(curve(tmp_path / "one", key)), rel=1e-4)
    for key in ("dev", "test", "zero_shot"):
        assert getattr(two, key) == pytest.approx(getattr(one, key), abs=0.05)  # rounding may decide one row of the 20
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
