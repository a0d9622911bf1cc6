"""A sweep while it runs: on a terminal a bar below the cells that have ended, anywhere else a plain line for each."""

from __future__ import annotations

import json
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from iapt.config.visible import visible
from iapt.folder.names import JOBS

SECONDS_BETWEEN_LOOKS = 0.2


class View:
    """Watches a sweep directory from a thread of its own.

    Args:
        sweep: the sweep directory.
        total: the jobs of this sweep; None if nobody knows beforehand.
    """

    def __init__(self, sweep: Path, total: int | None) -> None:
        self._path, self._total = sweep / JOBS, total
        self._read = self._path.stat().st_size if self._path.exists() else 0  # what other starts left
        self._start = time.monotonic()
        self._counts = {"done": 0, "failed": 0, "other": 0}
        self._ran = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._console = Console(highlight=False, soft_wrap=True, markup=False)
        self._bar: Progress | None = None

    def start(self) -> None:
        """Begin."""
        if sys.stdout.isatty():
            columns = (SpinnerColumn(), TextColumn("cells"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task(self._state(), total=self._total)
            self._bar.start()
        self._thread.start()

    def stop(self) -> None:
        """End, once every job that has ended is shown."""
        self._ended.set()
        self._thread.join()
        self._look()
        if self._bar:
            self._bar.stop()

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.splitlines():
                self._show(json.loads(line))
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=sum(self._counts.values()), description=self._state())

    def _show(self, job: dict[str, Any]) -> None:
        status = str(job["status"])
        self._counts[{"ok": "done", "failed": "failed"}.get(status, "other")] += 1
        self._ran += bool(job["ran"])
        number, total = sum(self._counts.values()), self._total or "?"
        parts = [f"[{number}/{total}] {job['task']}", str(job["method"]), f"seed {job['seed']}"]
        value = job["dev"] if job["test"] is None else job["test"]
        if status == "ok":
            parts.append(f"{job['metric']} {100 * value:.1f}" if value is not None else "ok")
            parts.append(_clock(job["train_seconds"] or 0))
        else:
            parts.append(status if job["ran"] or status != "running" else "running in another process")
        if not job["ran"] and status in ("ok", "failed"):
            parts.append("before" if status == "ok" else "before (sweep.retry=failed runs it again)")
        elif not self._bar and (left := self._left()):
            parts.append(left)
        self._console.print(visible("  ".join(parts)))

    def _state(self) -> str:
        counts = self._counts
        left = "?" if self._total is None else self._total - sum(counts.values())
        other = f"  {counts['other']} elsewhere" if counts["other"] else ""
        return f"{counts['done']} done  {counts['failed']} failed{other}  {left} left  {self._left()}"

    def _left(self) -> str:
        """From the pace of the jobs that ran, however many of them at a time."""
        left = (self._total or 0) - sum(self._counts.values())
        if left <= 0 or not self._ran:
            return ""
        return f"eta {_clock((time.monotonic() - self._start) / self._ran * left)}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
