"""The table's order and columns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from rich.console import Console

from iapt.cli.tables import Ended, ranked, summary_table
from iapt.folder.summary import Summary


def row(folder: str, **values: Any) -> Ended:
    named = {"task": "a", "backbone": "x", "method": "m", "metric": "accuracy", "status": "ok"}
    return Path(folder), Summary(**(named | values))


def text(*rows: Ended) -> str:
    console = Console(width=300)
    with console.capture() as captured:
        console.print(summary_table(rows))
    return captured.get()


def test_task_then_backbone_then_the_best_first_and_failures_last():
    wanted = [
        row("1", test=0.9, dev=0.1),
        row("2", test=0.5, dev=0.9),
        row("3"),
        row("4", test=0.99, status="failed"),
        row("5", backbone="y", test=1.0),
        row("6", task="b", test=0.2),
        row("7", task="b", status="failed"),
    ]
    for seed in range(5):
        shuffled = random.Random(seed).sample(wanted, len(wanted))
        assert [folder.name for folder, _ in ranked(shuffled)] == ["1", "2", "3", "4", "5", "6", "7"]


def test_ties_stay_in_the_order_of_the_jobs():
    assert [folder.name for folder, _ in ranked([row(str(i), test=0.5) for i in range(12)])] == [
        str(i) for i in range(12)
    ]


def test_an_evaluation_of_dev_is_ranked_by_dev():
    rows = [row("1", dev=0.3, test=None), row("2", dev=0.7, test=None), row("3", test=None, dev=None)]
    assert [folder.name for folder, _ in ranked(rows)] == ["2", "1", "3"]


def test_a_job_that_left_no_summary_can_be_ranked():
    rows = [row("1", test=0.5), (Path("2"), Summary(status="failed", reason="ended without a summary"))]
    assert {folder.name for folder, _ in ranked(rows)} == {"1", "2"}


def test_notes_have_a_column_only_if_there_are_any():
    noted = text(row("1", note="reference: trains nothing"), row("2", note=None), row("3"))
    assert "note" in noted
    assert "reference: trains nothing" in noted
    assert "None" not in noted
    assert "note" not in text(row("1", note=None), row("2"))
