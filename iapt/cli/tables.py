"""Summaries as one table: what a run, an evaluation or a sweep prints last."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from iapt.config.visible import visible
from iapt.folder.summary import Summary

Ended = tuple[Path, Summary]  # a folder and what came of its run


def ranked(jobs: Sequence[Ended]) -> list[Ended]:
    """By task, then backbone; within these the best test value first and failed runs last. Ties keep their order.

    Where test was not scored (`iapt-eval split=dev`) the dev value decides; rows without either come after those
    with one.
    """

    def key(job: Ended) -> tuple[Any, ...]:
        s = job[1]
        values = [value for value in (s.test, s.dev) if value is not None]
        return s.task or "", s.backbone or "", not s.finished, not values, -values[0] if values else 0

    return sorted(jobs, key=key)


def summary_table(jobs: Sequence[Ended]) -> Table:
    """One row for each job, in their order. A failed run shows its reason.

    `seed` and `backbone` get a column only where they differ between the rows, `note` where any row has one.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    extra = [key for key in ("backbone", "seed") if len({getattr(s, key) for _, s in jobs}) > 1]
    for name in ("task", "method", *extra, "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("zero-shot", "dev", "test", "params", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    noted = any(s.note for _, s in jobs)
    if noted:
        table.add_column("note", overflow="fold")
    table.add_column("folder", overflow="fold")
    for folder, s in jobs:
        names = [str(getattr(s, key) or "") for key in ("task", "method", *extra, "metric")]
        scores = [_score(value) for value in (s.zero_shot, s.dev, s.test)]
        row = [
            *names,
            *scores,
            "" if s.trainable_params is None else f"{s.trainable_params:,}",
            _duration(s.train_seconds),
            " ".join([s.status, *(s.reason or "").split()]),  # a list of problems has a line for each
            *([s.note or ""] if noted else []),
            _short(str(folder)),
        ]
        table.add_row(*map(visible, row))
    return table


def print_summaries(jobs: Sequence[Ended]) -> None:
    """Print the table to stdout: fitted to a terminal, as wide as it needs to be anywhere else."""
    console = Console(markup=False, highlight=False)
    table = summary_table(jobs)
    if not sys.stdout.isatty():
        # Rich assumes 80 columns for a pipe and would fold what a log or a grep needs in one line.
        widest = Console(width=100_000).measure(table).maximum
        console = Console(width=max(widest, 80), markup=False, highlight=False, color_system=None)
    console.print(table)


def _score(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(folder: str) -> str:
    relative = os.path.relpath(folder)
    return relative if len(relative) < len(folder) else folder
