"""Summaries as one table: what a run, an evaluation or a sweep prints last."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from iapt.config.visible import visible

Summary = Mapping[str, Any]


def ranked(summaries: Sequence[Summary]) -> list[Summary]:
    """By task, then backbone; within these the best test value first and failed runs last. Ties keep their order.

    Where test was not scored (`iapt-eval split=dev`) the dev value decides; rows without either come after those
    with one.
    """

    def key(s: Summary) -> tuple[Any, ...]:
        values = [s[name] for name in ("test", "dev") if s.get(name) is not None]
        failed = s.get("status") != "ok"
        return str(s.get("task") or ""), str(s.get("backbone") or ""), failed, not values, -values[0] if values else 0

    return sorted(summaries, key=key)


def summary_table(summaries: Sequence[Summary]) -> Table:
    """One row per summary (the keys of `summary.json`, and `folder`), in their order. A failed run shows its reason.

    `seed` and `backbone` get a column only where they differ between the rows, `note` where any row has one.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    extra = [key for key in ("backbone", "seed") if len({str(s.get(key)) for s in summaries}) > 1]
    for name in ("task", "method", *extra, "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("zero-shot", "dev", "test", "params", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    noted = any(s.get("note") for s in summaries)
    if noted:
        table.add_column("note", overflow="fold")
    table.add_column("folder", overflow="fold")
    for s in summaries:
        names = [str(s.get(key) or "") for key in ("task", "method", *extra, "metric")]
        scores = [_score(s.get(key)) for key in ("zero_shot", "dev", "test")]
        count = s.get("trainable_params")
        row = [
            *names,
            *scores,
            f"{count:,}" if count is not None else "",
            _duration(s.get("train_seconds")),
            _status(s),
            *([str(s.get("note") or "")] if noted else []),
            _short(s.get("folder")),
        ]
        table.add_row(*map(visible, row))
    return table


def print_summaries(summaries: Sequence[Summary]) -> None:
    """Print the table to stdout: fitted to a terminal, as wide as it needs to be anywhere else."""
    console = Console(markup=False, highlight=False)
    table = summary_table(summaries)
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


def _status(summary: Summary) -> str:
    reason = str(summary.get("reason") or "").strip()
    # A list of problems has a line for each; a cell shows them in one.
    return " ".join([str(summary.get("status", "")), *reason.split()]).strip()


def _short(folder: str | None) -> str:
    if not folder:
        return ""
    relative = os.path.relpath(folder)
    return relative if len(relative) < len(str(folder)) else str(Path(folder))
