"""A sweep started again: what is skipped, continued and retried, with several processes and after kill -9."""

import importlib.util
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from iapt.config.errors import TrainingError
from iapt.folder.summary import Summary, read_summary
from iapt.methods.settings import load_config
from iapt.runs import sweep
from iapt.runs.hardware import cores
from tests.test_cli import Command, Runs
from tests.test_cli import command as command
from tests.test_cli import runs as runs
from tests.test_launch import config_with, contents
from tests.test_launch import stub as stub

SHORT = "trainer.max_steps=12 trainer.eval_every=4 task.max_train_examples=64 task.max_eval_examples=32 zero_shot=false"
GRID = ["method=prompt_tuning,bitfit", "seed=1,2"]


def environment() -> dict[str, str]:
    """With this checkout's code, wherever the command is started."""
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(sweep.__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def started(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "iapt.cli.train", "-m", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=folder, env=environment(), text=True, stdout=pipe, stderr=subprocess.STDOUT)


def table(printed: str) -> list[list[str]]:
    return sorted(line.split() for line in printed.splitlines() if line.strip().startswith("toy/entailment"))


def results(folder: Path) -> dict[tuple[str, int], list[Any]]:
    """(method, seed) -> dev, test and trained parameters of every run folder."""
    found = {}
    for path in folder.rglob("summary.json"):
        s = json.loads(path.read_text())
        assert (s["method"], s["seed"]) not in found
        found[s["method"], s["seed"]] = [s["status"], s["best_dev_loss"], s["dev"], s["test"], s["steps"]]
    return found


# --- what a cell is -----------------------------------------------------------------------------------------------


def test_a_cell_is_what_its_result_depends_on(tmp_path: Path) -> None:
    one = sweep.cell_id(config_with())
    assert len(one) == 16
    cosmetic: list[dict[str, Any]] = [
        {"resume": True}, {"sweep": {"retry": "failed"}}, {"tracking": {"mode": "offline"}},
        {"trainer": {"log_every": 3}}, {"data_dir": str(tmp_path)},
    ]  # fmt: skip
    for change in cosmetic:
        assert sweep.cell_id(config_with(**change)) == one
    others: list[dict[str, Any]] = [
        {"seed": 2}, {"method": {"bottleneck": 3}}, {"hardware": {"precision": "bf16"}}, {"budget": "20k"},
        {"trainer": {"learning_rate": 1e-2}}, {"task": {"template": "{y}"}}, {"backbone": {"dtype": "float32"}},
    ]  # fmt: skip
    ids = {one, *(sweep.cell_id(config_with(**change)) for change in others)}
    assert len(ids) == 1 + len(others)


def test_of_local_data_the_content_counts_and_not_the_place(tmp_path: Path) -> None:
    ids = []
    for name, text in (("a", "x\n1\n"), ("b", "x\n1\n"), ("c", "x\n2\n")):
        (tmp_path / name / "t").mkdir(parents=True)
        (tmp_path / name / "t" / "train.csv").write_text(text)
        (tmp_path / name / "t" / "NOTES.md").write_text(name)
        ids.append(sweep.cell_id(config_with(data_dir=str(tmp_path / name))))
    assert ids[0] == ids[1] != ids[2]


def test_a_cell_under_work_is_kept_from_others_until_the_last_process_ends(tmp_path: Path) -> None:
    with sweep.claim(tmp_path, tmp_path / "0", "aa") as first:
        assert (first.folder, first.free, first.settled(False)) == (tmp_path / "0", True, None)
        (tmp_path / "1").mkdir()
        with sweep.claim(tmp_path, tmp_path / "1", "aa") as second:
            assert (second.folder, second.free) == (tmp_path / "0", False)
            assert second.settled(True) == Summary(status="running")
        assert not (tmp_path / "1").exists()
        with sweep.claim(tmp_path, tmp_path / "0", "bb") as other:  # another cell lies in its folder
            assert (other.folder, other.free) == (tmp_path / "0-2", True)
        code = (
            "from pathlib import Path; from iapt.runs.sweep import share; "
            f"share(Path({str(tmp_path / '0')!r})); print(1); input()"
        )
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
    assert sweep.is_held(tmp_path, tmp_path / "0")
    child.kill()
    child.wait()
    child.communicate()
    assert not sweep.is_held(tmp_path, tmp_path / "0")


# --- started again ------------------------------------------------------------------------------------------------


def test_cells_are_found_whatever_number_their_job_has(runs: Runs, command: Command) -> None:
    assert command("-m", "method=lora,iapt", "hydra.sweep.dir=s")[0] == 0
    before = contents(Path("s/1"))
    code, out, _ = command("-m", "method=bitfit,iapt,lora", "hydra.sweep.dir=s", "tracking.mode=offline")
    assert code == 0
    assert [config.method.name for config, _ in runs] == ["lora", "iapt", "bitfit"]
    assert contents(Path("s/1")) == before
    assert [row[1] for row in table(out)] == ["bitfit", "iapt", "lora"]
    assert "3 of 3 runs finished" in out
    assert [line.split()[1:3] for line in out.splitlines() if line.endswith("before")] == [
        ["toy/entailment", "iapt"],
        ["toy/entailment", "lora"],
    ]
    assert {p.name for p in Path("s").iterdir() if p.is_dir()} == {"0", "1", "0-2"}


def test_a_failed_cell_runs_again_only_when_told_to(runs: Runs, command: Command) -> None:
    grid = ("-m", "method=lora,iapt", "hydra.sweep.dir=s")
    runs.fail = lambda config: TrainingError("nan") if config.method.name == "lora" else None  # type: ignore[method-assign,assignment]
    assert command(*grid)[0] == 1
    runs.fail = lambda config: None  # type: ignore[method-assign,assignment]
    code, out, _ = command(*grid)
    assert (code, len(runs)) == (1, 2)
    assert "failed nan" in out
    assert "sweep.retry=failed" in out
    from iapt.cli import callbacks

    callbacks.exit_code = 0
    code, out, _ = command(*grid, "sweep.retry=failed")
    assert (code, len(runs)) == (0, 3)
    assert "2 of 2 runs finished" in out
    assert "sweep.retry" not in out


def test_a_bad_setting_of_the_sweep_itself_ends_it(runs: Runs, command: Command) -> None:
    code, _, err = command("-m", "seed=1,2", "sweep.retry=faild", "hydra.sweep.dir=s")
    assert (code, err.count("sweep.retry = 'faild': allowed are none, failed")) == (2, 1)
    assert not runs
    assert not [p for p in Path("s").iterdir() if p.is_dir()]


def test_a_missing_launcher_names_the_extra(runs: Runs, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = command("-m", "hydra/launcher=joblib", "seed=1,2")
    assert (code, "pip install 'iapt[parallel]'" in err) == (2, True)


def kill(process: "subprocess.Popen[str]") -> None:
    """kill -9 of a sweep and of all that it has started."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in family:
        if child.is_running():
            child.kill()
    process.communicate()


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    process = started(folder, *GRID, *SHORT.split(), "hydra.sweep.dir=s")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return folder / "s", printed


@pytest.mark.full
def test_killed_half_way_and_started_again_it_is_the_same_sweep(
    tmp_path: Path, uninterrupted: tuple[Path, str]
) -> None:
    arguments = [*GRID, *SHORT.split(), "hydra.sweep.dir=s"]
    process = started(tmp_path, *arguments)
    # In the second cell: the first one is finished, this one has a state to go on from.
    wait_for(lambda: (tmp_path / "s/1/state/latest.pt").exists(), process)
    kill(process)
    first = contents(tmp_path / "s" / "0")
    assert read_summary(tmp_path / "s" / "0").status == "ok"
    assert not (tmp_path / "s" / "1" / "summary.json").exists()

    again = started(tmp_path, *arguments)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert contents(tmp_path / "s" / "0") == first
    whole, table_of_whole = uninterrupted
    assert results(tmp_path / "s") == results(whole)
    assert len(results(whole)) == 4

    def scores(text: str) -> list[list[str]]:  # all but the time
        return [[word for word in row if ":" not in word] for row in table(text)]

    assert scores(printed) == scores(table_of_whole)
    logs = [(tmp_path / "s" / str(job) / "output.log").read_text() for job in range(4)]
    assert ["trainable parameters on" in log for log in logs] == [True] * 4
    assert [log.count("resumed at step") for log in logs] == [0, 1, 0, 0]
    assert [log.count("trainable parameters on") for log in logs] == [1, 2, 1, 1]


def test_a_killed_sweep_leaves_no_run_behind(tmp_path: Path, stub: Callable[[str], None]) -> None:
    stub("sleep")
    process = started(tmp_path, "hydra.sweep.dir=s", "seed=1")
    place = tmp_path / "s" / "0" / "rank-.json"
    wait_for(lambda: place.exists() and bool(place.read_text()), process)
    child = psutil.Process(json.loads(place.read_text())["pid"])
    os.kill(process.pid, signal.SIGKILL)
    child.wait(20)
    process.communicate()
    assert not sweep.is_held(tmp_path / "s", tmp_path / "s" / "0")


# --- several at a time --------------------------------------------------------------------------------------------


@pytest.mark.full
def test_joblib_runs_several_at_a_time_in_one_directory(
    tmp_path: Path, stub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs iapt[parallel]")
    stub("none")
    arguments = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "method=lora,iapt", "seed=1,2,2"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    process = started(tmp_path, *arguments)  # into a directory named after the time of the start: still one
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    [directory] = (tmp_path / "outputs" / "sweeps").iterdir()
    ran = sorted(directory.rglob("rank-.json"))
    assert len(ran) == 4  # seed 2 stands there twice, and is one cell
    assert {json.loads(path.read_text())["OMP_NUM_THREADS"] for path in ran} == {str(max(1, cores() // 2))}
    assert len(list(directory.rglob("cell.json"))) == 4
    assert "4 of 4 runs finished" in printed
    assert "[6/6]" in printed

    again = started(tmp_path, *arguments, f"hydra.sweep.dir={directory}")
    printed, _ = again.communicate(timeout=300)
    assert printed.count("before") == 6
    assert sorted(directory.rglob("rank-.json")) == ran


@pytest.mark.full
def test_submitit_runs_jobs_on_its_local_executor(tmp_path: Path, stub: Callable[[str], None]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs iapt[slurm]")
    stub("bad method")
    arguments = ["hydra/launcher=submitit_local", "method=lora,iapt", "hydra.sweep.dir=s"]
    process = started(tmp_path, *arguments)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1, printed
    assert [(row[1], "failed" in row) for row in table(printed)] == [("iapt", False), ("lora", True)]
    assert "1 of 2 runs finished" in printed
    pids = {json.loads(path.read_text())["pid"] for path in (tmp_path / "s").rglob("rank-.json")}
    assert len(pids) == 2


# --- what one sees ------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_on_a_terminal_there_is_a_bar_and_elsewhere_a_line_for_each(
    tmp_path: Path, stub: Callable[[str], None]
) -> None:
    stub("bad method")
    process = started(tmp_path, "method=lora,iapt", "hydra.sweep.dir=s")
    printed, _ = process.communicate(timeout=120)
    lines = [line for line in printed.splitlines() if line.startswith("[")]
    assert [line.split()[:3] for line in lines] == [
        ["[1/2]", "toy/entailment", "lora"],
        ["[2/2]", "toy/entailment", "iapt"],
    ]
    assert "failed" in lines[0]
    assert "eta 0:00:" in lines[0]
    assert "accuracy" not in lines[0]
    assert "left" not in printed

    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "iapt.cli.train", "-m", "method=lora,iapt", "hydra.sweep.dir=t"]
    on_terminal = subprocess.Popen(
        line, cwd=tmp_path, stdout=theirs, stderr=theirs, env=environment() | {"TERM": "xterm"}
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # what a terminal whose program has ended says on Linux
        pass
    os.close(ours)
    assert on_terminal.wait(60) == 1
    assert b"0 done  0 failed  2 left" in shown
    assert b"0 done  1 failed  1 left  eta" in shown
    assert b"[2/2] toy/entailment  iapt" in shown


def test_the_schema_knows_the_settings() -> None:
    assert load_config({"task": {"name": "t", "template": "x"}, "method": {"name": "iapt"}}).sweep.retry == "none"
