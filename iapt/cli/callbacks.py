"""What a sweep shows: a line for each cell that ends, how many are left, and one table of all at the end."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from iapt.config.errors import TrainingError, UserError
from iapt.folder.files import read_config, run_folders
from iapt.folder.summary import FAILED, INTERRUPTED, RUNNING, UNFINISHED, Summary, names_in, read_summary

if TYPE_CHECKING:
    from iapt.cli.tables import Ended
    from iapt.cli.view import View

exit_code = 0  # of the last sweep; Hydra has no way to return one
place = ""  # the override that leads back to the last sweep
_view: View | None = None  # not an attribute of the callback, which launchers send to other processes


class SweepTable(Callback):  # type: ignore[misc]
    """Reads the jobs' folders, not their return values, so that any launcher will do."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Watch the sweep directory, and share the cores among jobs that all start at once."""
        global place, _view
        sweep, total = Path(config.hydra.sweep.dir), count_jobs(config)
        place = f"hydra.sweep.dir={os.path.relpath(sweep)}"
        if total and str(config.hydra.launcher.get("_target_")).endswith("submitit_launcher.LocalLauncher"):
            from iapt.runs.hardware import cores

            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // total)))
        stop_view()
        from iapt.cli.view import View  # with rich, which a command that shows no sweep does without

        _view = View(sweep.absolute(), total)
        _view.start()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, ranked, and keep the exit code: 1 if a run failed, 2 if all failures are bad input."""
        global exit_code

        stop_view()
        jobs = collect(Path(config.hydra.sweep.dir))
        failures = [s.exit_code or TrainingError.exit_code for _, s in jobs if not s.finished]
        only_bad_input = all(code == UserError.exit_code for code in failures)
        if failures:
            exit_code = UserError.exit_code if only_bad_input else TrainingError.exit_code
        from iapt.cli.tables import print_summaries, ranked  # with rich too

        print_summaries(ranked(jobs))
        print(f"{len(jobs) - len(failures)} of {len(jobs)} runs finished, in {config.hydra.sweep.dir}")
        if any(summary.status == FAILED for _, summary in jobs):
            print("the same command with sweep.retry=failed runs the failed ones again")


def stop_view() -> None:
    """Show what is still to be shown, and give the terminal back."""
    global _view
    if _view:
        _view.stop()
        _view = None


def count_jobs(config: DictConfig) -> int | None:
    """The number of jobs of a sweep; None if its sweeper decides on the way."""
    if not str(config.hydra.sweeper.get("_target_")).endswith(".BasicSweeper"):
        return None
    texts = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    try:
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        overrides = parser.parse_overrides([*texts, *config.hydra.overrides.task])
        return len(BasicSweeper.split_arguments(overrides, None)[0])
    except HydraException:  # the sweeper will say the same
        return None


def collect(sweep: Path) -> list[Ended]:
    """Every run folder below `sweep` and its summary, in the order of the jobs."""
    jobs = [(folder, _summary(sweep, folder)) for folder in run_folders(sweep)]
    return sorted(jobs, key=lambda job: [int(n) for n in re.findall(r"\d+", str(job[0]))])


def _summary(sweep: Path, folder: Path) -> Summary:
    from iapt.runs.sweep import is_held

    summary = read_summary(folder)
    if summary.status != UNFINISHED:
        return summary
    try:
        names = names_in(read_config(folder))
    except UserError:
        names = {}
    if is_held(sweep, folder):
        return Summary(**names, status=RUNNING, reason="in another process")
    return Summary(**names, status=INTERRUPTED, reason="the sweep started again continues it")
