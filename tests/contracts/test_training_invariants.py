"""The part of the contract that needs a training run: every method on every shape, as in test_invariants.py."""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from iapt.config.schema import BackboneConfig
from iapt.model.backbone import build_backbone
from tests.contracts.conftest import SHAPES, Case, build_model
from tests.contracts.training import make_trainer, name_of, outcome

ROOT = Path(__file__).resolve().parents[2]
_WHOLE: dict[str, dict[str, Any]] = {}


@pytest.fixture
def whole(case: Case, shape: str, tmp_path: Path) -> dict[str, Any]:
    """The uninterrupted run in one process with undivided batches, trained once a cell."""
    name = name_of(case, shape)
    if name not in _WHOLE:
        if not build_model(case, shape).trainable():
            pytest.skip("trains nothing")
        _WHOLE[name] = outcome(make_trainer(case, shape, tmp_path / "whole"))
    return _WHOLE[name]


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Up to rounding. Gradients are compared in the first step only: Adam turns a rounding error in a gradient that
    is zero into a full step, which moves the tensors far and the losses hardly at all."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found["gradients"][name], gradient, rtol=1e-3, atol=1e-3 * scale + 1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_6_resumed_training_equals_the_uninterrupted(case: Case, shape: str, tmp_path: Path, whole: dict[str, Any]):
    interrupted = make_trainer(case, shape, tmp_path / "resumed")
    original = interrupted._train_step

    def die() -> None:
        if interrupted.step == 3:  # its last state is step 2's
            raise KeyboardInterrupt
        original()

    interrupted._train_step = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    again = make_trainer(case, shape, tmp_path / "resumed")
    with torch.no_grad():
        for parameter in again.model.trainable().values():
            parameter.zero_()  # everything comes out of the state
    torch.manual_seed(999)
    resumed = outcome(again, resume=True)
    assert resumed["losses"] == whole["losses"]
    for tensors in ("adapter", "best"):
        assert resumed[tensors].keys() == whole[tensors].keys()
        assert all(torch.equal(t, whole[tensors][name]) for name, t in resumed[tensors].items())


def test_9_accumulated_gradients_equal_one_pass(case: Case, shape: str, tmp_path: Path, whole: dict[str, Any]):
    assert_same_training(outcome(make_trainer(case, shape, tmp_path / "parts", accumulation=2)), whole)


@pytest.fixture(scope="session")
def two_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a two-process job left the results of all cells that this session is going to ask for."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # all workers share one job
    folder = base / "two_processes"
    with FileLock(base / "two_processes.lock"):
        if not folder.exists():
            folder.mkdir()
            wanted = [item.callspec.params for item in request.session.items if _asks_for_the_job(item)]
            _run_job(folder, [(params["case"].id, params["shape"]) for params in wanted])
    return folder


def _asks_for_the_job(item: Any) -> bool:
    return "two_processes" in getattr(item, "fixturenames", ()) and item.get_closest_marker("skip") is None


def _run_job(folder: Path, cells: list[tuple[str, str]]) -> None:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "tests.contracts.training", str(folder)]
    # A job ends at its first failing cell; the next one goes on behind it.
    while cells:
        (folder / "cells.json").write_text(json.dumps(cells))
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        (folder / "stderr.txt").write_text(done.stderr)
        reached = [i for i, (case, shape) in enumerate(cells) if list(folder.glob(f"*/{glob.escape(case)}-{shape}.*"))]
        if done.returncode == 0 or not reached:
            return
        cells = cells[reached[-1] + 1 :]


def test_9_two_processes_equal_one(case: Case, shape: str, whole: dict[str, Any], two_processes: Path):
    name = name_of(case, shape)
    for error in two_processes.glob(f"*/{glob.escape(name)}.error"):
        pytest.fail(error.read_text())
    files = [two_processes / str(rank) / f"{name}.pt" for rank in (0, 1)]
    assert all(f.exists() for f in files), (two_processes / "stderr.txt").read_text()[-3000:]
    first, second = (torch.load(f) for f in files)
    assert_same_training(first, whole)
    for tensors in ("adapter", "best"):
        assert all(torch.equal(t, second[tensors][n]) for n, t in first[tensors].items())


@pytest.mark.parametrize("shape", SHAPES)
def test_1_a_built_backbone_is_frozen_and_in_eval_mode(shape: str):
    wide = {"vocab_size": 4096}  # random backbones speak the embedded tokenizer's language
    config = BackboneConfig(name=shape, kind="random", shape={"model_type": shape, **SHAPES[shape], **wide})
    lm = build_backbone(config).lm
    assert not any(p.requires_grad for p in lm.parameters())
    assert not any(module.training for module in lm.modules())
