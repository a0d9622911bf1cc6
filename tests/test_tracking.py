"""Nothing about telling people how a run goes may end the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from iapt.config.schema import TrackingConfig
from iapt.runs import experiment
from iapt.training.tracking import Tracker
from tests.test_experiment import config


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_offline_wandb_gets_what_the_jsonl_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = {"name": "wandb", "mode": "offline", "project": "test"}
    assert experiment.run(config(tracking=wandb), tmp_path / "run").status == "ok"
    assert records(tmp_path / "run")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_online_wandb_without_a_key_goes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    experiment.run(config(tracking={"name": "wandb", "mode": "online"}), tmp_path / "run")
    assert "no API key found, so this run is recorded offline" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["init_trackers", "log", "end_training"])
def test_a_failing_tracker_costs_only_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
):
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("the network is down")

    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "trackers", ["there"])
    for name in ("init_trackers", "log", "end_training"):
        monkeypatch.setattr(accelerator, name, fail if name == broken else lambda *a, **k: None)
    tracker = Tracker(tmp_path, accelerator, "name")
    tracker.start_wandb(TrackingConfig(name="wandb", mode="offline"), {})
    tracker.log(1, {"loss": 2.0})
    tracker.finish()
    assert records(tmp_path) == [{"step": 1, "loss": 2.0}]
    assert "the network is down" in capsys.readouterr().out


def test_rewind_forgets_what_came_after(tmp_path: Path):
    tracker = Tracker(tmp_path, Accelerator(cpu=True), "name")
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.rewind(2)
    assert [r["step"] for r in records(tmp_path)] == [1, 2]
