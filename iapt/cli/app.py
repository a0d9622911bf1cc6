"""What the commands share: Hydra around a job, exit codes, and one readable message for every bad input.

Exit codes: 0 done, 1 a run failed, 2 bad input, 130 interrupted. Set HYDRA_FULL_ERROR=1 for tracebacks.
"""

from __future__ import annotations

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
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iapt.errors import ConfigError, TrainingError, UserError
from iapt.paths import CONFIG_DIR

# (composed configuration, run folder, whether it is a job of a sweep) -> summary
Job = Callable[[DictConfig, Path, bool], dict[str, Any]]
# composed configuration -> its problems
Check = Callable[[DictConfig], list[str]]


@dataclass
class _Outcome:
    """What the job leaves for the command, because Hydra would wrap an exception and print it twice."""

    error: UserError | TrainingError | None = None
    place: str = ""  # the override that leads back to this run or sweep


def run_command(config_name: str, job: Job, check: Check) -> None:
    """Compose, run the job or the sweep of jobs, and leave the process with the right exit code.

    Args:
        config_name: the primary config.
        job: what one run does.
        check: the problems of a composed configuration, for a command line that Hydra refuses.
    """
    outcome, typed = _Outcome(), sys.argv[1:]

    def task(composed: DictConfig) -> float:
        return _run_job(composed, job, outcome)

    command = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(task)
    try:
        _run_hydra(command, config_name, check)
    except (UserError, TrainingError) as error:
        outcome.error = error
    except KeyboardInterrupt:
        print(f"\ninterrupted; to continue:\n  {_resume_command(typed, outcome.place)}", file=sys.stderr)
        sys.exit(130)
    if outcome.error:
        print(outcome.error, file=sys.stderr)
        sys.exit(outcome.error.exit_code)
    from iapt.cli import callbacks

    sys.exit(callbacks.exit_code)


def _run_hydra(command: Callable[[], Any], config_name: str, check: Check) -> None:
    """Run Hydra; what it refuses becomes a UserError, or is run once more with the settings forced."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        command()
        return
    from iapt.cli.diagnose import diagnose, message

    # Otherwise Hydra prints its errors itself and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    refused = (HydraException, OmegaConfBaseException)
    try:
        command()
    except refused as error:
        args = get_args_parser().parse_args()
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


def _run_job(composed: DictConfig, job: Job, outcome: _Outcome) -> float:
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    in_sweep = settings.mode == RunMode.MULTIRUN
    key = "sweep" if in_sweep else "run"
    outcome.place = f"hydra.{key}.dir={os.path.relpath(settings.sweep.dir if in_sweep else folder)}"
    try:
        summary = job(composed, folder, in_sweep)
    except Exception as error:
        if not any(folder.iterdir()):
            folder.rmdir()  # Hydra made it; nothing happened in it
        if not in_sweep and not isinstance(error, UserError | TrainingError):
            raise
        if in_sweep:
            # The other jobs go on. Their table reads the folders, so the reason must stand there.
            from iapt.launch import record_failure

            record_failure(folder, error, OmegaConf.to_container(composed))  # type: ignore[arg-type]
        if isinstance(error, UserError | TrainingError):
            print(error, file=sys.stderr) if in_sweep else setattr(outcome, "error", error)
        else:
            traceback.print_exc()
        return float("nan")  # for sweepers that optimise
    if not in_sweep:
        from iapt.tables import print_summaries

        print_summaries([{**summary, "folder": str(folder)}])
    return float("nan") if summary.get("dev") is None else float(summary["dev"])


def _resume_command(typed: list[str], place: str) -> str:
    kept = [a for a in typed if a.split("=")[0].lstrip("+") not in (place.split("=")[0], "resume")]
    return shlex.join([Path(sys.argv[0]).name, *kept, place, "resume=true"])
