"""One composed config -> one or many processes.

Hydra composes once, here in the parent; what runs reads the resolved `config.yaml` of the run folder. So
several ranks share one folder and one configuration, and each job of a sweep can have processes (GPU memory,
tracker run) of its own. Everything that can be refused is refused before the folder is touched.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import torch

from iapt.config.errors import ConfigError, TrainingError, UserError
from iapt.config.fields import Role
from iapt.config.roles import role_of
from iapt.config.schema import Config, to_dict
from iapt.folder.files import read_config, write_config
from iapt.folder.names import CELL, CONFIG, OUTPUT, STATE, SUMMARY
from iapt.folder.summary import FAILED, SCHEMA_VERSION, Summary, names_in, read_summary, refuse_finished, write_summary
from iapt.model.checkpoint import load_adapter
from iapt.runs.hardware import check_hardware, cores
from iapt.runs.sweep import cell_id, flatten, read_cell

log = logging.getLogger(__name__)

# Of a run's own process: interrupted, or told to stop, as a batch system tells every process of a job at once.
STOPPED = (128 + signal.SIGINT, -signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM)
SECONDS_TO_STOP = 20.0


def launch(config: Config, folder: Path, *, own_process: bool = False) -> Summary:
    """Run `config` in `folder` and return its summary.

    Args:
        config: what to run; relative local paths are made absolute in what is saved.
        folder: the run folder; made if it is missing.
        own_process: run in a process of its own even if there is only one. In the folder of a sweep's cell
            its output goes to `output.log`.

    Raises:
        UserError: hardware that is not there, a folder that holds another run, bad input found on the way.
        TrainingError: training failed, or its process died.
    """
    if not config.resume:
        refuse_finished(folder)
    elif (before := read_summary(folder)).finished:
        log.info("%s: already finished, nothing to do", folder)
        return before
    config = with_absolute_paths(config)
    if (folder / STATE).parent.exists():  # there only while a run is unfinished
        if not config.resume:
            raise UserError(
                f"{folder} holds an interrupted run; nothing was changed. Give resume=true to continue it, "
                "or choose another hydra.run.dir"
            )
        _check_same_run(config, folder)
    check_hardware(config)
    for key, named in config.method.adapters().items():
        if named:
            load_adapter(Path(named), f"method.{key}")

    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).unlink(missing_ok=True)  # of an attempt that failed
    write_config(folder, to_dict(config))
    if own_process or config.hardware.num_processes > 1:
        return _run_in_child(config, folder)

    from iapt.runs import experiment

    try:
        return experiment.run(config, folder)
    except Exception as error:
        record_failure(folder, error, to_dict(config))
        raise


def record_failure(folder: Path, error: Exception, config: dict[str, Any]) -> bool:
    """Leave a `summary.json` that says why the run failed; a finished run's or an earlier failure's stays.

    Args:
        folder: the run folder; made if it is missing.
        error: why.
        config: the configuration as a mapping, as far as it is known.

    Returns:
        Whether this call wrote it (of several ranks that fail together, one does).
    """
    there = read_summary(folder)
    if there.finished or there.exit_code is not None:
        return False
    expected = isinstance(error, UserError | TrainingError)
    told = {
        **names_in(config),
        "reason": str(error) if expected else f"{type(error).__name__}: {error}",
        "exit_code": error.exit_code if isinstance(error, UserError | TrainingError) else 1,
    }
    # The run itself may have said more.
    own = {key: value for key, value in told.items() if getattr(there, key) is None}
    write_summary(folder, dataclasses.replace(there, status=FAILED, schema_version=SCHEMA_VERSION, **own))
    return True


def start_ranks(folder: Path, config: Config) -> int:
    """Start an `iapt.runs.worker` per rank with accelerate's launcher, in this process; returns the exit code."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    n = config.hardware.num_processes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // n)))
    os.environ["PYTHONSAFEPATH"] = "1"  # -P, for the ranks
    on_cpu = config.hardware.device == "cpu" or not torch.cuda.is_available()
    if on_cpu:
        # `--cpu` would start a single process; `--multi_gpu` starts ranks, and this makes them gloo ranks.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # The elastic agent logs a long report when ranks end with an error; the reason stands in summary.json.
    logging.disable(logging.CRITICAL)
    # Spelled out, so that somebody's `accelerate config` file changes nothing. Port 0: any free one.
    options = f"--multi_gpu --num_processes {n} --num_machines 1 --machine_rank 0 --main_process_port 0"
    options += " --gpu_ids all --mixed_precision no --dynamo_backend no --module"
    args = launch_command_parser().parse_args([*options.split(), "iapt.runs.worker", str(folder), "--quiet"])
    try:
        launch_command(args)
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _run_in_child(config: Config, folder: Path) -> Summary:
    # -P, as in the command itself: a file of the working directory, evaluate.py say, is not the library of that name.
    command = [sys.executable, "-P", "-m", "iapt.runs.worker", str(folder), "--quiet", "--parent", str(os.getpid())]
    output = (folder / OUTPUT).open("ab") if (folder / CELL).exists() else None
    # A session of its own: an interrupt arrives once, from here, and not a second time from the terminal.
    child = subprocess.Popen(command, start_new_session=True, stdout=output, stderr=output)
    before = _on_terminate(_raise_exit)
    try:
        code = child.wait()
    finally:
        _on_terminate(before)
        if output:
            output.close()
        if child.poll() is None:
            _stop(child)
    summary = read_summary(folder)
    if code == 0 and summary.finished:
        return summary
    if code in STOPPED:
        raise KeyboardInterrupt
    ended = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"ended with exit code {code}"
    reason = summary.reason or f"the process of this run {ended} and left no summary"
    error = UserError(reason) if code == UserError.exit_code else TrainingError(reason)
    record_failure(folder, error, to_dict(config))
    raise error


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Interrupt the child; whatever of it and its ranks is left after a while is killed."""
    family = _family(child.pid)
    try:
        child.send_signal(signal.SIGINT)
        child.wait(SECONDS_TO_STOP)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        family |= _family(child.pid)
    for process in family:
        if process.is_running():  # compares start times too, so a reused pid is safe
            process.kill()
    child.wait()


def _family(pid: int) -> set[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return {parent, *parent.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def _on_terminate(handler: Any) -> Any:
    """Install what happens on SIGTERM and return what happened before; signals belong to the main thread."""
    try:
        return signal.signal(signal.SIGTERM, handler)
    except ValueError:
        return None


def _raise_exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def with_absolute_paths(config: Config) -> Config:
    """A saved config must mean the same from every working directory."""
    changes: dict[str, Any] = {}
    if config.data_dir:
        changes["data_dir"] = str(Path(config.data_dir).expanduser().absolute())
    if config.backbone.path and Path(config.backbone.path).expanduser().is_dir():
        path = str(Path(config.backbone.path).expanduser().absolute())
        changes["backbone"] = dataclasses.replace(config.backbone, path=path)
    named = {key: folder for key, folder in config.method.adapters().items() if folder}
    if named:
        adapters: dict[str, Any] = {key: str(Path(folder).expanduser().absolute()) for key, folder in named.items()}
        changes["method"] = dataclasses.replace(config.method, **adapters)
    return dataclasses.replace(config, **changes)


def _check_same_run(config: Config, folder: Path) -> None:
    if read_cell(folder) == cell_id(config):
        return
    saved = flatten(read_config(folder))
    if not saved:
        raise UserError(f"{folder / CONFIG}: is missing or empty, so the run cannot be resumed")
    new = flatten(to_dict(config))
    found = []
    for key in sorted({*saved, *new}):
        if Role.MAY_DIFFER not in role_of(key) and saved.get(key) != new.get(key):
            found.append(f"{key} = {new.get(key)!r}: the run to resume has {saved.get(key)!r}")
    if found:
        raise ConfigError(found)
