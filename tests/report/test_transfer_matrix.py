"""Runs that start from another run's adapter: rows of their own, and the transfer matrix."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from iapt.cli import report
from iapt.config.schema import to_dict
from iapt.report.cells import Board, Column, Row, gather
from iapt.report.plots import Plot
from iapt.report.runs import read_runs
from iapt.report.transfer_matrix import matrices, transfer_plots, transfer_sheets
from iapt.runs import experiment
from tests.report.folders import make_failed, make_run, make_sweep
from tests.test_experiment import config

ENTAILMENT, SENTIMENT = "toy/entailment", "toy/sentiment"


def board(root: Path) -> Board:
    [found] = gather(read_runs([root]))
    return found


def started(folder: Path, source: str | None, seed: int = 1, **changes: Any) -> Path:
    """A run of prompt tuning that started from a run on `source` with the same seed, or afresh."""
    origin = f"/runs/{source}-{seed}" if source else None
    settings = {"method": {"name": "prompt_tuning", "init_from": origin, **changes.pop("method", {})}}
    record = {"folder": origin, "task": source, "seed": seed, "method": "prompt_tuning"} if source else None
    return make_run(folder, method="prompt_tuning", seed=seed, settings=settings, init_from=record, **changes)


def make_matrix(root: Path) -> Path:
    """Two seeds each: entailment afresh and from two tasks, sentiment from one task alone."""
    for seed in (1, 2):
        started(root / f"a{seed}", None, seed, right=10)
        started(root / f"b{seed}", SENTIMENT, seed, right=11 + seed)
        started(root / f"c{seed}", "e2e", seed, right=7)
        started(root / f"d{seed}", ENTAILMENT, seed, right=17, task=SENTIMENT)
    return root


def texts(root: Path) -> list[list[str]]:
    [sheet] = transfer_sheets(board(root))
    return [sheet.header, *([entry.text for entry in line] for line in sheet.lines)]


def drawn(root: Path) -> Plot:
    [plot] = transfer_plots(board(root))
    return plot


def test_rows_are_told_apart_by_the_task_they_start_from(tmp_path: Path):
    found = board(make_matrix(tmp_path))
    assert [str(row) for row in found.rows] == [
        "prompt_tuning, init_from=null",
        "prompt_tuning, init_from=toy/sentiment",
        "prompt_tuning, init_from=e2e",
        "prompt_tuning, init_from=toy/entailment",
    ]
    assert all(len(cell.values) == 2 for cell in found.cells.values()), "the folders differ with the seed"


def test_runs_from_before_there_was_such_a_setting_started_afresh(tmp_path: Path):
    make_run(tmp_path / "old", method="prompt_tuning", seed=1)
    started(tmp_path / "new", None, seed=2)
    assert board(tmp_path).rows == [Row("prompt_tuning")]


def test_a_failed_run_stands_in_the_row_of_its_source(tmp_path: Path):
    source = make_run(tmp_path / "source", method="prompt_tuning", task=SENTIMENT)
    started(tmp_path / "a", None, seed=1)
    started(tmp_path / "b", SENTIMENT, seed=1)
    failed = make_failed(tmp_path / "c", method="prompt_tuning", seed=2)
    settings = yaml.safe_load((failed / "config.yaml").read_text())
    settings["method"]["init_from"] = str(source)
    (failed / "config.yaml").write_text(yaml.safe_dump(settings))
    cell = board(tmp_path).cells[
        Row("prompt_tuning", (("method.init_from", SENTIMENT),)), Column(ENTAILMENT, "accuracy")
    ]
    assert (len(cell.values), len(cell.reasons)) == (1, 1)


def test_an_adapter_without_a_task_is_known_by_its_folder(tmp_path: Path):
    folder = started(tmp_path / "a", None)
    summary = json.loads((folder / "summary.json").read_text())
    summary["init_from"] = {"folder": "/saved/from/python", "task": None, "seed": None, "method": "prompt_tuning"}
    (folder / "summary.json").write_text(json.dumps(summary))
    [matrix] = matrices(board(tmp_path))
    assert matrix.sources == ["/saved/from/python"]


def test_the_matrix_shows_gains_over_a_fresh_start_and_medians_without_one(tmp_path: Path):
    assert texts(make_matrix(tmp_path)) == [
        ["source", ENTAILMENT, SENTIMENT],
        ["none", "50.0 (n 2)", "not run"],
        ["e2e", "-15.0 (n 2)", "not run"],
        [ENTAILMENT, "not run", "85.0 (n 2)"],
        [SENTIMENT, "+12.5 (n 2)", "not run"],
    ]
    [sheet] = transfer_sheets(board(tmp_path))
    assert sheet.notes[0].endswith("in a column without fresh runs")


def test_the_picture_has_the_tables_numbers(tmp_path: Path):
    plot = drawn(make_matrix(tmp_path))
    assert plot.name == "transfer_prompt-tuning_tiny"
    axes, colours = plot.figure.axes
    [image] = axes.images
    gains = image.get_array().tolist()
    assert [gains[0][0], gains[2][0]] == pytest.approx([-15, 12.5])
    assert [gains[0][1], gains[1], gains[2][1]] == [None, [None, None], None], "no colour without a fresh run"
    assert image.get_clim() == pytest.approx((-15, 15)), "the middle colour is no gain"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["e2e", ENTAILMENT, SENTIMENT]
    assert [label.get_text() for label in axes.get_xticklabels()] == [ENTAILMENT, SENTIMENT]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {
        (0, 0): "-15.0 (n 2)", (1, 0): "", (0, 1): "", (1, 1): "85.0 (n 2)", (0, 2): "+12.5 (n 2)", (1, 2): "",
    }  # fmt: skip
    assert colours.get_ylabel() == "points above a fresh start"


def test_other_settings_and_methods_have_a_matrix_of_their_own(tmp_path: Path):
    for tokens, right in ((4, 12), (8, 18)):
        method = {"num_soft_tokens": tokens}
        started(tmp_path / f"a{tokens}", None, method=method, right=10)
        started(tmp_path / f"b{tokens}", SENTIMENT, method=method, right=right)
    found = matrices(board(tmp_path))
    assert [str(matrix.row) for matrix in found] == [
        "prompt_tuning, num_soft_tokens=4",
        "prompt_tuning, num_soft_tokens=8",
    ]
    column = Column(ENTAILMENT, "accuracy")
    assert [matrix.gain(SENTIMENT, column) for matrix in found] == pytest.approx([0.1, 0.4])
    names = [plot.name for plot in transfer_plots(board(tmp_path))]
    assert names == ["transfer_prompt-tuning-num-soft-tokens-4_tiny", "transfer_prompt-tuning-num-soft-tokens-8_tiny"]


def test_without_such_runs_it_says_why(tmp_path: Path):
    make_sweep(tmp_path)
    plot = drawn(tmp_path)
    assert plot.figure is None
    assert plot.reason == "no finished run started from another run's adapter (method.init_from)"
    assert transfer_sheets(board(tmp_path)) == []


def test_the_report_has_picture_and_table(tmp_path: Path):
    root = make_matrix(tmp_path / "runs")
    report.run([str(root), "--out", str(tmp_path / "out")])
    name = "transfer_prompt-tuning_tiny"
    assert (tmp_path / "out" / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.reader((tmp_path / "out" / f"{name}.csv").open()))
    assert rows == texts(root)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'<table id="{name}">' in page
    assert "Transfer: gain of starting from another task&#39;s adapter, prompt_tuning" in page


def test_real_runs(tmp_path: Path):
    """Pre-training on plain text, then a run from it and a fresh one, to a report."""
    first = config("next_sentence", "prompt_tuning")
    experiment.run(first, tmp_path / "plain")
    values = {}
    for name, source in (("fresh", None), ("from", str(tmp_path / "plain"))):
        second = config(method="prompt_tuning")
        second.method.init_from = source
        values[name] = experiment.run(second, tmp_path / "runs" / name).test
        (tmp_path / "runs" / name / "config.yaml").write_text(yaml.safe_dump(to_dict(second)))
    report.run([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    [written] = (tmp_path / "out").glob("transfer_*.csv")
    rows = list(csv.reader(written.open()))
    assert rows[1:] == [
        ["none", f"{100 * values['fresh']:.1f} (n 1)"],
        ["toy/next_sentence", f"{100 * (values['from'] - values['fresh']):+.1f} (n 1)"],
    ]
