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

if TYPE_CHECKING:
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
        from iapt.cli.tables import print_summaries, ranked

        stop_view()
        jobs = collect(Path(config.hydra.sweep.dir))
        failures = [job.get("exit_code", TrainingError.exit_code) for job in jobs if job["status"] != "ok"]
        only_bad_input = all(code == UserError.exit_code for code in failures)
        if failures:
            exit_code = UserError.exit_code if only_bad_input else TrainingError.exit_code
        print_summaries(ranked(jobs))
        print(f"{len(jobs) - len(failures)} of {len(jobs)} runs finished, in {config.hydra.sweep.dir}")
        if any(job["status"] == "failed" for job in jobs):
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


def collect(sweep: Path) -> list[dict[str, Any]]:
    """The summary of every run folder below `sweep`, in the order of the jobs, each with its `folder`."""
    from iapt.model.checkpoint import SUMMARY, read_summary
    from iapt.runs.launch import CONFIG_FILE

    folders = {path.parent for name in (CONFIG_FILE, SUMMARY) for path in sweep.rglob(name)}
    jobs = [{**(read_summary(folder) or _unfinished(sweep, folder)), "folder": str(folder)} for folder in folders]
    return sorted(jobs, key=lambda job: [int(n) for n in re.findall(r"\d+", job["folder"])])


def _unfinished(sweep: Path, folder: Path) -> dict[str, Any]:
    import yaml

    from iapt.runs.launch import CONFIG_FILE
    from iapt.runs.sweep import is_held

    try:
        config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        names = {key: config[key]["name"] for key in ("task", "method", "backbone")} | {"seed": config["seed"]}
    except (OSError, yaml.YAMLError, LookupError, TypeError):
        names = {}
    if is_held(sweep, folder):
        return {**names, "status": "running", "reason": "in another process"}
    return {**names, "status": "interrupted", "reason": "the sweep started again continues it"}
