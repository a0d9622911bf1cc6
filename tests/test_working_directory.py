"""A relative path means the directory of the command line, also where Hydra changes into the run's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from iapt.cli import eval, train
from iapt.config.schema import Config
from iapt.data import toy
from iapt.model.backbone import TINY_DIR
from iapt.runs import experiment, launch
from tests.test_cli import Command, Runs
from tests.test_cli import command as command
from tests.test_cli import runs as runs

CHDIR = "hydra.job.chdir=true"
SMALL = ("debug=default", "zero_shot=false", "method=prompt_tuning", "task.source.generator=null", "data_dir=data")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working directory: a task's files, a backbone and questions lie in it."""
    for split in ("train", "validation", "test"):
        rows = [json.dumps(row) for row in list(toy.rows("entailment", split))[:40]]
        (tmp_path / "data/toy/entailment").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/toy/entailment/{split}.jsonl").write_text("\n".join(rows))
    shutil.copytree(TINY_DIR, tmp_path / "model")
    question = {"question_id": 1, "category": "math", "turns": ["Who has a ball?", "And who has none?"]}
    (tmp_path / "question.jsonl").write_text(json.dumps(question))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_run_in_child", experiment.run)
    return tmp_path


def test_training_and_evaluation_and_their_sweeps(place: Path, command: Command) -> None:
    def run(*arguments: str, main: Any = train.main) -> None:
        code, out, err = command(*arguments, CHDIR, main=main)
        assert code == 0, out + err
        assert Path.cwd() == place

    backbone = ("backbone=hf", "backbone.path=model")
    run(*SMALL, *backbone, "hydra.run.dir=runs/first")
    saved = yaml.safe_load((place / "runs/first/config.yaml").read_text())
    assert (saved["data_dir"], saved["backbone"]["path"]) == (str(place / "data"), str(place / "model"))

    sweep = ("-m", *SMALL, *backbone, "method.init_from=runs/first", "seed=1,2", "hydra.sweep.dir=runs/sweep")
    run(*sweep)
    cells = [place / "runs/sweep/0/summary.json", place / "runs/sweep/1/summary.json"]
    assert [json.loads(cell.read_text())["status"] for cell in cells] == ["ok", "ok"]
    assert sorted(place.rglob("cell.json")) == [cell.with_name("cell.json") for cell in cells]
    before = [cell.stat().st_mtime_ns for cell in cells]
    run(*sweep)
    assert [cell.stat().st_mtime_ns for cell in cells] == before

    checkpoint = ("checkpoint=runs/first", "data_dir=data", "backbone=hf", "backbone.path=model")
    run(*checkpoint, "hydra.run.dir=runs/again", main=eval.main)
    assert json.loads((place / "runs/again/summary.json").read_text())["checkpoint"] == str(place / "runs/first")
    run("-m", *checkpoint, "split=dev,test", "hydra.sweep.dir=runs/evals", main=eval.main)
    asked = ("mt_bench.questions=question.jsonl", "mt_bench.max_new_tokens=2", "mt_bench.column=text")
    run(*checkpoint, *asked, "hydra.run.dir=runs/mt_bench", main=eval.main)

    assert {path.name for path in place.iterdir()} == {"data", "model", "question.jsonl", "runs"}
    found = {str(path.parent.relative_to(place / "runs")) for path in (place / "runs").rglob("summary.json")}
    assert found == {"first", "sweep/0", "sweep/1", "again", "evals/0", "evals/1", "mt_bench"}


def test_an_interrupted_run_is_named_from_where_it_was_started(runs: Runs, command: Command) -> None:
    def interrupt(config: Config) -> Exception | None:
        raise KeyboardInterrupt

    runs.fail = interrupt  # type: ignore[method-assign,assignment]
    code, _, err = command("hydra.run.dir=some/where", CHDIR)
    assert code == 130
    assert err.strip().endswith(f"iapt-train {CHDIR} hydra.run.dir=some/where resume=true")


def test_a_folder_in_which_nothing_happened_goes(runs: Runs, command: Command) -> None:
    code, _, err = command("method.learning_rate=0", "hydra.run.dir=here", CHDIR)
    assert code == 2
    assert "trainer.learning_rate" in err
    assert not Path("here").exists()
