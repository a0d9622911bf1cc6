"""What the commands share: Hydra around a job, exit codes, and one readable message for every bad input.

Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted. Set HYDRA_FULL_ERROR=1 for tracebacks.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from iapt.config.errors import ConfigError, TrainingError, UserError
from iapt.config.paths import CONFIG_DIR
from iapt.folder.summary import FAILED, Summary, names_in, read_summary

# (composed configuration, run folder, whether it is a job of a sweep) -> summary
Job = Callable[[DictConfig, Path, bool], Summary]
# composed configuration -> its problems
Check = Callable[[DictConfig], list[str]]
# composed configuration -> the hash by which a sweep finds its cell again
Identify = Callable[[DictConfig], str]
LAUNCHERS = {"joblib": "parallel", "submitit_local": "slurm", "submitit_slurm": "slurm"}  # -> the extra with it


@dataclass
class _Outcome:
    """The outcome that the job leaves for the command, because Hydra would wrap an exception and print it twice."""

    error: UserError | TrainingError | None = None
    place: str = ""  # the override that leads back to this run or sweep


def run_command(config_name: str, job: Job, check: Check, identify: Identify | None = None) -> None:
    """Compose, run the job or the sweep of jobs, and leave the process with the right exit code.

    Args:
        config_name: the primary config.
        job: what one run does.
        check: the problems of a composed configuration, for a command line that Hydra refuses.
        identify: makes the jobs of a sweep cells, of which only those are run that are not settled.
    """
    from iapt.cli import callbacks

    # For each group that it lists, --help makes a copy of everything that Hydra's plugins registered, half a second in
    # all. Nothing writes into the copies, and what is loaded from them is copied once more.
    ConfigStore.__deepcopy__ = lambda store, memo: store
    outcome, typed = _Outcome(), sys.argv[1:]

    def task(composed: DictConfig) -> float:
        os.chdir(HydraConfig.get().runtime.cwd)  # out of the run's folder, where hydra.job.chdir=true has gone
        return _run_job(composed, job, outcome, identify)

    command = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(task)
    try:
        _warn_of_releases()
        _run_hydra(command, config_name, check)
    except (UserError, TrainingError) as error:
        outcome.error = error
    except KeyboardInterrupt:
        place = outcome.place or callbacks.place
        print(f"\ninterrupted; to continue:\n  {_resume_command(typed, place)}", file=sys.stderr)
        sys.exit(130)
    finally:
        callbacks.stop_view()
    if outcome.error:
        print(outcome.error, file=sys.stderr)
        sys.exit(outcome.error.exit_code)
    sys.exit(callbacks.exit_code)


def _warn_of_releases() -> None:
    """Say which libraries are newer than what was tested, but for a command that only shows its help."""
    if get_args_parser().parse_known_args()[0].help:
        return
    from iapt.config.releases import beyond_tested

    if said := beyond_tested():
        print(said, file=sys.stderr)


def loading(command: str, what: str) -> None:
    """Say at once what is about to run: the libraries that it needs take seconds to import."""
    print(f"{command} {what}: loading torch and transformers", file=sys.stderr, flush=True)


def _run_hydra(command: Callable[[], Any], config_name: str, check: Check) -> None:
    """Run Hydra; what it refuses becomes a UserError, or is run once more with the settings forced."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        command()
        return
    from iapt.cli.diagnose import diagnose, message

    args = get_args_parser().parse_args()
    _need_one_command(args)
    _need_launchers(sys.argv[1:])
    # Otherwise Hydra prints its errors itself and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    refused = (HydraException, OmegaConfBaseException, ValueError)
    try:
        command()
    except YAMLError as error:
        raise UserError(f"a config file is no YAML: {' '.join(str(error).split())}") from None
    except SystemExit as end:
        raise SystemExit(UserError.exit_code if end.code == 1 else end.code) from None  # it has said what is wrong
    except refused as error:
        if isinstance(error, ValueError) and not _is_of_hydra(error):
            raise
        if args.shell_completion:
            raise UserError(message(error)) from None
        try:
            problems, forced = diagnose(args, config_name, check)
        except refused:
            problems, forced = [], args.overrides
        if problems:
            raise ConfigError(problems) from None
        if forced == args.overrides:
            raise UserError(message(error)) from None
        sys.argv[1:] = [forced[args.overrides.index(a)] if a in args.overrides else a for a in sys.argv[1:]]
        try:
            command()
        except refused as error:
            raise UserError(message(error)) from None
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)


def _need_one_command(args: argparse.Namespace) -> None:
    """Hydra answers flags that do not go together with a traceback."""
    if args.help or args.hydra_help:
        return
    flags = {"-m": args.multirun, "--run": args.run, "--cfg": args.cfg, "--info": args.info}
    given = [name for name, value in {**flags, "--shell-completion": args.shell_completion}.items() if value]
    if len(given) > 1:
        one = args.multirun and (args.cfg or args.info)
        hint = f"; {given[1]} shows one configuration: leave -m out, and give every setting one value" if one else ""
        raise UserError(f"{', '.join(given)}: only one of them at a time{hint}")
    if args.resolve and not args.cfg:
        raise UserError("--resolve: only together with --cfg or --help")
    if args.shell_completion and "COMP_LINE" not in os.environ and any(a.startswith("query=") for a in args.overrides):
        install = f'eval "$({Path(sys.argv[0]).name} -sc install=bash)"'
        raise UserError(f"--shell-completion query=...: is asked by a shell that was told {install}")


def _is_of_hydra(error: BaseException) -> bool:
    """Say whether Hydra itself raised the error, and not a job that Hydra ran."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(str(frames[-1][0].f_globals.get("__name__")).startswith("hydra."))


def _need_launchers(arguments: list[str]) -> None:
    """Hydra would say that a launcher of a package that is not installed does not exist."""
    for name, extra in LAUNCHERS.items():
        package = f"hydra_plugins.hydra_{name.split('_')[0]}_launcher"
        if f"hydra/launcher={name}" in arguments and not _is_installed(package):
            raise ConfigError([f"hydra/launcher = {name}: its package is not installed; pip install 'iapt[{extra}]'"])


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the parent
        return False


def _run_job(composed: DictConfig, job: Job, outcome: _Outcome, identify: Identify | None) -> float:
    """Run one job and return its dev value, not a number if it has none (for sweepers that optimise)."""
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    in_sweep = settings.mode == RunMode.MULTIRUN
    key = "sweep" if in_sweep else "run"
    outcome.place = f"hydra.{key}.dir={os.path.relpath(settings.sweep.dir if in_sweep else folder)}"
    summary: Summary | None = None
    if in_sweep and identify:
        summary = _run_cell(composed, job, identify, Path(settings.sweep.dir).absolute(), folder)
    elif in_sweep:
        summary = _run_recorded(composed, job, folder)
    else:
        try:
            summary = job(composed, folder, False)
        except (UserError, TrainingError) as error:
            outcome.error = error
        finally:
            if not any(folder.iterdir()):
                folder.rmdir()  # Hydra made it; nothing happened in it
        if summary:
            from iapt.cli.tables import print_summaries

            print_summaries([(folder, summary)])
    return float("nan") if summary is None or summary.dev is None else summary.dev


def _run_cell(composed: DictConfig, job: Job, identify: Identify, sweep: Path, folder: Path) -> Summary:
    """Run the job unless its cell is settled; the cell's summary."""
    from iapt.runs.sweep import claim, note_job

    allowed = ("none", "failed")
    if composed.sweep.retry not in allowed:  # of the whole sweep, so no row of its table
        folder.rmdir()
        raise ConfigError([f"sweep.retry = {composed.sweep.retry!r}: allowed are {', '.join(allowed)}"])
    with claim(sweep, folder, identify(composed)) as held:
        settled = held.settled(retry=composed.sweep.retry == "failed" or composed.resume is True)
        summary = _run_recorded(composed, job, held.folder) if settled is None else settled
        if summary.task is None:  # of a run that another process is at work on
            summary = dataclasses.replace(summary, **names_in(OmegaConf.to_container(composed)))  # type: ignore[arg-type]
        note_job(sweep, held.folder, summary, ran=settled is None)
    return summary


def _run_recorded(composed: DictConfig, job: Job, folder: Path) -> Summary:
    """Run a job of a sweep. The others go on when it fails; their table reads the folders, so the reason goes there."""
    try:
        return job(composed, folder, True)
    except Exception as error:
        from iapt.runs.launch import record_failure

        record_failure(folder, error, OmegaConf.to_container(composed))  # type: ignore[arg-type]
        if isinstance(error, UserError | TrainingError):
            print(error, file=sys.stderr)
        else:
            traceback.print_exc()
        return dataclasses.replace(read_summary(folder), status=FAILED, dev=None)


def _resume_command(typed: list[str], place: str) -> str:
    kept = [a for a in typed if a.split("=")[0].lstrip("+") not in (place.split("=")[0], "resume")]
    return shlex.join([Path(sys.argv[0]).name, *kept, place, "resume=true"])
