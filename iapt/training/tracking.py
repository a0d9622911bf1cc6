"""Telling people how a run goes: metrics.jsonl always, a progress bar on a terminal, wandb if asked.

Nothing in here may end a run: a missing key or network costs the wandb record, not the training.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from iapt.config.schema import TrackingConfig
from iapt.config.visible import visible
from iapt.folder.names import METRICS

log = logging.getLogger(__name__)


class Tracker:
    """The main process's record of a run; on every other process all its methods do nothing.

    Args:
        folder: the run folder; `metrics.jsonl` in it is continued if the run is.
        accelerator: owns the wandb tracker.
        name: what the run is called in wandb.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, name: str) -> None:
        self._main = accelerator.is_main_process
        self._path = folder / METRICS
        self._accelerator = accelerator
        self._name = name
        self._progress: Progress | None = None
        self._console = Console(highlight=False, soft_wrap=True)

    def start_wandb(self, config: TrackingConfig, run_config: dict[str, Any]) -> None:
        """Open the wandb run that the accelerator was asked for; on any failure say so and go on without."""
        if config.name != "wandb" or not self._main:
            return
        mode = config.mode
        if mode == "online" and not _has_wandb_key():
            self.say("wandb: no API key found, so this run is recorded offline (`wandb login`, then `wandb sync`)")
            mode = "offline"
        options = {
            "name": self._name,
            "entity": config.entity,
            "group": config.group,
            "tags": config.tags,
            "mode": mode,
            "dir": str(self._path.parent),
        }
        try:
            self._accelerator.init_trackers(config.project, run_config, {"wandb": options})
        except Exception as error:  # wandb raises a family of its own, and network errors of three libraries
            self.say(f"wandb: not available ({type(error).__name__}: {error}); the run goes on without it")
            self._accelerator.trackers = []

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`: a resumed run will log it again."""
        if not self._main or not self._path.exists():
            return
        lines = [line for line in self._path.read_text().splitlines() if json.loads(line)["step"] <= step]
        self._path.write_text("".join(f"{line}\n" for line in lines))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """One record."""
        if not self._main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        try:
            self._accelerator.log(values, step=step)
        except Exception as error:
            self.say(f"wandb: logging failed ({error}); the run goes on without it")
            self._accelerator.trackers = []

    def say(self, text: str) -> None:
        """A line for people."""
        if self._main:
            (self._progress.console if self._progress else self._console).print(visible(text), markup=False)

    def start_progress(self, total: int, done: int) -> None:
        """Begin the bar; on anything but a terminal `advance` prints plain lines instead."""
        if not (self._main and sys.stdout.isatty()):
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self._progress.add_task("training", total=total, completed=done, status="")
        self._progress.start()

    def advance(self, step: int, total: int, status: str, *, line: bool) -> None:
        """Show where training is; without a terminal only the steps marked `line` are printed."""
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, status=status)
        elif line:
            self.say(f"step {step}/{total}  {status}")

    def stop_progress(self) -> None:
        """End the bar, if there is one."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def finish(self) -> None:
        """Close wandb."""
        try:
            if self._main and self._accelerator.trackers:
                self._accelerator.end_training()
        except Exception as error:
            self.say(f"wandb: could not close the run ({error})")


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    return bool(wandb.api.api_key)
