"""Run folders of every kind, as they are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iapt.config.errors import UserError
from iapt.report.runs import read_runs
from tests.report.folders import make_failed, make_run, make_unfinished


def test_every_folder_is_read_once_and_in_the_order_of_jobs(tmp_path: Path):
    for name in ("10", "2", "1"):
        make_run(tmp_path / "sweep" / name, seed=int(name))
    runs = read_runs([tmp_path / "sweep", tmp_path / "sweep" / "2", tmp_path])
    assert [run.folder.name for run in runs] == ["1", "2", "10"]
    assert [run.seed for run in runs] == [1, 2, 10]
    assert runs[0].hours == pytest.approx(0.01)
    assert runs[0].on_cpu
    assert runs[0].circumstances["versions.torch"] == "2.13.0"
    assert runs[0].circumstances["backbone_fingerprint"] == "57e8399c58f879b7"


def test_failed_and_unfinished_runs_say_why(tmp_path: Path):
    failed, unfinished = read_runs([make_failed(tmp_path / "1"), make_unfinished(tmp_path / "2")])
    assert (failed.status, failed.reason) == ("failed", "out of memory (a larger gradient_accumulation needs less)")
    assert unfinished.status == "unfinished"
    assert "last logged step 10" in unfinished.reason, "a line cut off by a crash must not count or raise"
    assert "resume=true" not in unfinished.reason
    assert (unfinished.name("task"), unfinished.name("method"), unfinished.seed) == ("toy/entailment", "lora", 1)
    (unfinished.folder / "state").mkdir()
    (unfinished.folder / "state" / "latest.pt").write_bytes(b"")
    assert "resume=true" in unfinished.reason


def test_predictions_may_hold_any_line_separator(tmp_path: Path):
    folder = make_run(tmp_path / "1")
    records = [{"text": "a\u2028b\x85c", "references": ["x"]}, {"text": "d", "references": ["y"]}]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    assert read_runs([folder])[0].predictions == records


def test_gpu_hours_count_every_process(tmp_path: Path):
    [run] = read_runs([make_run(tmp_path / "1", device="NVIDIA A40", num_processes=4, train_seconds=1800.0)])
    assert run.hours == pytest.approx(2.0)
    assert not run.on_cpu


def test_an_evaluation_has_the_settings_of_its_run(tmp_path: Path):
    run = make_run(tmp_path / "run", method="iapt", soft_tokens=7)
    folder = tmp_path / "eval"
    folder.mkdir()
    summary = {"task": "harness/x", "method": "iapt", "seed": 1, "checkpoint": str(run), "status": "ok", "test": 0.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    [evaluation] = read_runs([folder])
    assert evaluation.settings["method.num_soft_tokens"] == 7
    assert evaluation.num_soft_tokens == 7
    assert "task.metrics" not in evaluation.settings


@pytest.mark.parametrize("damage", ["no such folder", "is a file", "no run folder in it", "cannot be read", "mapping"])
def test_what_cannot_be_read_is_named(tmp_path: Path, damage: str):
    path = tmp_path / "x"
    if damage == "is a file":
        path.write_text("")
    elif damage == "no run folder in it":
        path.mkdir()
    elif damage != "no such folder":
        make_run(path)
        (path / "config.yaml").write_text("a: [" if damage == "cannot be read" else "- 1")
    with pytest.raises(UserError, match=damage) as error:
        read_runs([path])
    assert str(path) in str(error.value)
