"""One config -> one or many processes: what is refused, what is written, and that nothing is left running."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from omegaconf import OmegaConf

import iapt
from iapt.config.errors import ConfigError, TrainingError, UserError
from iapt.config.schema import Config, to_dict
from iapt.folder.summary import Summary, read_summary, write_summary
from iapt.methods.settings import load_config
from iapt.runs.hardware import check_hardware, cores
from iapt.runs.launch import launch, record_failure

BASE = {"task": {"name": "t", "template": "{x}"}, "method": {"name": "iapt"}, "hardware": {"device": "cpu"}}
two_cores = pytest.mark.skipif(cores() < 2, reason="two processes need two cores")

# Stands in for iapt.runs.experiment in processes that a test cannot reach into; python imports it at start.
STUB = """
import json, os, signal, sys, time, types
from pathlib import Path

def run(config, folder):
    from iapt.config.errors import TrainingError, UserError
    rank, action = os.environ.get("RANK", "-"), os.environ["STUB_ACTION"]
    facts = {k: os.environ.get(k) for k in ("WORLD_SIZE", "OMP_NUM_THREADS")} | {"pid": os.getpid()}
    if action == "gather":
        from accelerate import Accelerator
        import torch
        accelerator = Accelerator()
        total = accelerator.reduce(torch.tensor([1.0 + accelerator.process_index]))
        facts |= {"device": accelerator.device.type, "total": total.item()}
        facts |= {"kind": str(accelerator.distributed_type)}
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))
    if action == "sleep":
        time.sleep(60)
    if action == "bad input":
        raise UserError("no such column")
    if action == "nan" or (action == "bad method" and config.method.name == "lora"):
        raise TrainingError("the loss is nan")
    if action == "bug":
        raise RuntimeError("a bug")
    if action == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    from iapt.folder.summary import Summary, write_summary
    summary = Summary(status="ok", task=config.task.name, method=config.method.name, dev=0.5)
    write_summary(folder, summary)
    return summary

stub = types.ModuleType("iapt.runs.experiment")
stub.run = run
sys.modules["iapt.runs.experiment"] = stub
"""


def config_with(**changes: object) -> Config:
    config = load_config(OmegaConf.merge(BASE, changes))
    assert isinstance(config, Config)
    return config


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Path]]:
    """Replaces the experiment in this process; the list holds its calls."""
    calls: list[tuple[Config, Path]] = []

    def run(config: Config, folder: Path) -> Summary:
        calls.append((config, folder))
        summary = Summary(status="ok", dev=0.5)
        write_summary(folder, summary)
        return summary

    monkeypatch.setattr("iapt.runs.experiment.run", run)
    return calls


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replaces the experiment in child processes and says what it shall do there."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "sitecustomize.py").write_text(STUB)
    # With this checkout's code, wherever the child is started.
    checkout = Path(iapt.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (tmp_path / "stub", checkout))))
    return lambda action: monkeypatch.setenv("STUB_ACTION", action)


def test_one_process_runs_here_and_the_saved_config_is_plain_and_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[tuple[Config, Path]]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    backbone = {"kind": "pretrained", "path": "model"}
    assert launch(config_with(data_dir="data", backbone=backbone), tmp_path / "run").status == "ok"
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["data_dir"] == str(tmp_path / "data")
    assert saved["backbone"]["path"] == str(tmp_path / "model")
    [(config, _)] = ran
    assert load_config(saved) == config
    hub = config_with(backbone={"kind": "pretrained", "path": "some/hub-id"})
    launch(hub, tmp_path / "run2")
    assert ran[1][0].backbone.path == "some/hub-id"


def test_a_finished_run_is_never_touched(tmp_path: Path, ran: list[tuple[Config, Path]]) -> None:
    launch(config_with(), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds a finished run"):
        launch(config_with(seed=2), tmp_path)
    assert launch(config_with(resume=True), tmp_path) == read_summary(tmp_path)
    assert contents(tmp_path) == before
    assert not record_failure(tmp_path, UserError("x"), {})
    assert contents(tmp_path) == before
    assert len(ran) == 1


def test_an_interrupted_run_continues_only_as_the_same_run(tmp_path: Path, ran: list[tuple[Config, Path]]) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config_with())))
    before = contents(tmp_path)
    with pytest.raises(UserError, match="resume=true"):
        launch(config_with(), tmp_path)
    with pytest.raises(ConfigError) as caught:
        launch(config_with(resume=True, seed=2, method={"bottleneck": 3}, trainer={"log_every": 1}), tmp_path)
    assert caught.value.problems == [
        "method.bottleneck = 3: the run to resume has 64",
        "seed = 2: the run to resume has 1",
    ]
    assert contents(tmp_path) == before
    may_differ = {"trainer": {"log_every": 1, "eval_batch_size": 2}, "hardware": {"gradient_accumulation": 2}}
    assert launch(config_with(resume=True, **may_differ), tmp_path).status == "ok"
    assert len(ran) == 1


def test_a_failure_is_recorded_and_the_next_attempt_starts_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ran: list[tuple[Config, Path]]
) -> None:
    def fail(config: Config, folder: Path) -> None:
        assert read_summary(folder).status == "unfinished"
        raise TrainingError("the loss is nan")

    with monkeypatch.context() as patch:
        patch.setattr("iapt.runs.experiment.run", fail)
        for _ in range(2):
            with pytest.raises(TrainingError):
                launch(config_with(), tmp_path)
            failed = read_summary(tmp_path)
            assert (failed.status, failed.reason, failed.exit_code) == (
                "failed",
                "the loss is nan",
                1,
            )
            assert (failed.task, failed.method, failed.seed) == ("t", "iapt", 1)
    assert launch(config_with(), tmp_path).status == "ok"


def test_the_first_failure_stays_and_what_the_run_recorded_too(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"status": "failed", "reason": "out of memory", "metric": "accuracy"}')
    assert record_failure(tmp_path, UserError("else"), {})
    assert read_summary(tmp_path).reason == "out of memory"
    assert read_summary(tmp_path).exit_code == 2
    assert not record_failure(tmp_path, TrainingError("late"), {})
    assert read_summary(tmp_path).exit_code == 2


def test_hardware_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        launch(
            config_with(
                hardware={"device": "cuda", "attention": "flash_attention_2"},
                backbone={"quantization": "nf4"},
            ),
            tmp_path / "run",
        )
    keys = [problem.split(":")[0] for problem in caught.value.problems]
    assert keys[0] == "hardware.device = cuda"
    assert "hardware.attention = flash_attention_2" in keys
    assert keys[-2:] == ["backbone.quantization = nf4"] * 2
    assert not (tmp_path / "run").exists()

    with pytest.raises(ConfigError, match=rf"num_processes = 4096: this machine has {cores()} core"):
        check_hardware(config_with(hardware={"num_processes": 4096, "device": "auto"}))
    check_hardware(config_with(hardware={"num_processes": cores(), "precision": "bf16"}))


def test_a_machine_with_one_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    check_hardware(config_with(hardware={"device": "auto"}))
    with pytest.raises(ConfigError, match=r"num_processes = 2: this machine has 1 GPU"):
        check_hardware(config_with(hardware={"device": "auto", "num_processes": 2}))
    with pytest.raises(ConfigError, match=r"precision = bf16: Tesla V100 has no bf16"):
        check_hardware(config_with(hardware={"device": "cuda", "precision": "bf16"}))


@pytest.mark.parametrize(
    ("action", "error", "reason"),
    [
        ("bad input", UserError, "no such column"),
        ("nan", TrainingError, "the loss is nan"),
        ("bug", TrainingError, "RuntimeError: a bug"),
        ("killed", TrainingError, "killed by signal 9"),
    ],
)
def test_what_ends_a_child_process_reaches_the_parent(
    tmp_path: Path, stub: Callable[[str], None], capfd: pytest.CaptureFixture[str],
    action: str, error: type[Exception], reason: str,
) -> None:  # fmt: skip
    stub(action)
    with pytest.raises(error, match=reason):
        launch(config_with(), tmp_path / "run", own_process=True)
    summary = read_summary(tmp_path / "run")
    assert (summary.status, summary.exit_code) == ("failed", 2 if error is UserError else 1)
    assert reason in summary.reason
    assert ("Traceback" in capfd.readouterr().err) == (action == "bug")


@pytest.mark.full
@two_cores
def test_two_processes_are_two_gloo_ranks(
    tmp_path: Path, stub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub("gather")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = config_with(hardware={"num_processes": 2})
    assert launch(config, tmp_path / "run").status == "ok"
    ranks = [json.loads((tmp_path / "run" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert len({os.getpid(), *(r["pid"] for r in ranks)}) == 3
    for facts in ranks:
        assert (facts["WORLD_SIZE"], facts["total"], facts["device"]) == ("2", 3.0, "cpu")
        assert facts["kind"].endswith("MULTI_CPU")
        assert facts["OMP_NUM_THREADS"] == str(cores() // 2)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=[two_cores, pytest.mark.full])])
def test_a_file_in_the_working_directory_is_not_the_library_of_that_name(
    tmp_path: Path, stub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    stub("nothing")
    (tmp_path / "omegaconf.py").write_text("raise ImportError('this is a file of the user')")
    monkeypatch.chdir(tmp_path)
    config = config_with(hardware={"num_processes": processes})
    assert launch(config, tmp_path / "run", own_process=True).status == "ok"


@pytest.mark.full
@two_cores
def test_ranks_that_fail_leave_one_reason_and_no_report_of_the_launcher(
    tmp_path: Path, stub: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    stub("bad input")
    with pytest.raises(UserError, match="no such column"):
        launch(config_with(hardware={"num_processes": 2}), tmp_path / "run")
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    assert "exitcode" not in printed
    assert sorted(contents(tmp_path / "run")) == ["config.yaml", "rank0.json", "rank1.json", "summary.json"]


@pytest.mark.full
@two_cores
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_an_interrupted_parent_leaves_nothing_running(
    tmp_path: Path, stub: Callable[[str], None], number: signal.Signals, processes: int
) -> None:
    stub("sleep")
    config = config_with(hardware={"num_processes": processes})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    code = (
        "import signal, sys, yaml; from pathlib import Path\n"
        "from iapt.methods.settings import load_config; from iapt.runs.launch import launch\n"
        # A shell starts what it runs in the background with interrupts ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "p = Path(sys.argv[1]); config = load_config(yaml.safe_load((p / 'config.yaml').read_text()))\n"
        # As the commands do. What Python itself exits with depends on what libraries run at exit.
        "try: launch(config, p / 'run', own_process=True)\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    files = [tmp_path / "run" / f"rank{rank}.json" for rank in ((0, 1) if processes == 2 else "-")]
    deadline = time.monotonic() + 60
    while not all(f.exists() and f.read_text() for f in files):
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.1)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert {json.loads(f.read_text())["pid"] for f in files} <= {p.pid for p in family}
    parent.send_signal(number)  # to the parent alone, as `kill` does; a terminal's Ctrl-C comes this way too
    assert parent.wait(120) in (-signal.SIGINT, 130, 128 + signal.SIGTERM)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not (tmp_path / "run" / "summary.json").exists()
