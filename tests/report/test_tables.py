"""The tables in every format: what an entry says, and that each format is well-formed."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from iapt.config.paths import CONFIG_DIR
from iapt.report.cells import Board, Row, gather
from iapt.report.published import published, reference_sheet
from iapt.report.render import comma_separated, latex, markdown, rich_table
from iapt.report.runs import read_runs
from iapt.report.sheet import Entry, Sheet, against, main_sheet
from tests.report.folders import make_failed, make_run, make_sweep


def board(root: Path) -> Board:
    return gather(read_runs([root]))[0]


def texts(sheet: Sheet) -> list[list[str]]:
    return [[entry.text for entry in line] for line in sheet.lines]


def test_medians_parameters_and_hours(tmp_path: Path):
    sheet = main_sheet(board(make_sweep(tmp_path)), ["median"])
    assert sheet.header == ["method", "toy/entailment", "toy/sentiment", "params", "compute-hours/run (CPU)"]
    assert texts(sheet) == [["lora", "60.0", "70.0", "69,632", "0.01"], ["iapt", "95.0", "70.0", "66,608", "0.01"]]
    best = [[entry.best for entry in line] for line in sheet.lines]
    assert best == [[False, False, True, False, False], [False, True, True, False, False]], "ties are all best"
    assert "n = 3 seeds in every cell" in sheet.notes[0]
    assert "protocol strict" in sheet.notes[0]


def test_spread_on_request(tmp_path: Path):
    sheet = main_sheet(board(make_sweep(tmp_path)), ["median", "mean", "std", "n", "range"])
    assert sheet.lines[1][1].text == "95.0 (mean 93.3, std 2.9, n 3, range 90.0–95.0)"


def test_missing_failed_and_incomplete_cells(tmp_path: Path):
    make_run(tmp_path / "1", seed=1)
    make_failed(tmp_path / "2", seed=2)
    make_run(tmp_path / "3", task="toy/sentiment", seed=1)
    make_run(tmp_path / "4", task="toy/sentiment", seed=2)
    make_failed(tmp_path / "5", method="iapt")
    sheet = main_sheet(board(tmp_path), ["median"])
    assert [line[1:3] for line in texts(sheet)] == [["75.0 (n 1) [1]", "75.0 (n 2)"], ["failed [2]", "not run"]]
    assert sheet.notes[1].startswith(f"[1] {tmp_path / '2'}: failed: out of memory (a larger")
    assert sheet.notes[2].startswith(f"[2] {tmp_path / '5'}: failed")
    assert texts(sheet)[1][3:] == ["", ""]


def test_hours_on_gpu_and_cpu_are_kept_apart(tmp_path: Path):
    make_run(tmp_path / "1", device="NVIDIA A40", num_processes=2)
    make_run(tmp_path / "2", method="iapt")
    sheet = main_sheet(board(tmp_path), ["median"])
    assert sheet.header[3:] == ["GPU-hours/run", "compute-hours/run (CPU)"]
    assert [line[3:] for line in texts(sheet)] == [["0.02", ""], ["", "0.01"]]


def test_marks_against_a_baseline(tmp_path: Path):
    found = board(make_sweep(tmp_path))
    tests = against(found, Row("lora"), 500)
    sheet = main_sheet(found, ["median"], Row("lora"), tests)
    assert [[entry.mark for entry in line] for line in sheet.lines] == [[""] * 5, ["", "+", "", "", ""]]
    assert "that of lora" in sheet.notes[0]
    worse = main_sheet(found, ["median"], Row("iapt"), against(found, Row("iapt"), 500))
    assert worse.lines[0][1].mark == "-"


def test_no_test_without_predictions(tmp_path: Path):
    make_sweep(tmp_path)
    (tmp_path / "0" / "predictions.jsonl").unlink()
    found = board(tmp_path)
    sheet = main_sheet(found, ["median"], Row("lora"), against(found, Row("lora"), 500))
    assert sheet.lines[1][1].mark == ""
    reason = "not tested against lora: iapt, toy/entailment: no test predictions in predictions.jsonl"
    assert reason in sheet.notes


HARD = Sheet(
    "t", "50% of_it & more",
    ["method", "a|b", "n"],
    [
        [Entry("x_y, k=[1] <b>"), Entry("1.0", True, "+"), Entry("2–3")],
        [Entry("z*"), Entry("0.5", mark="-"), Entry("")],
    ],
    ["[1] $5 #3 {a} ~ ^ \\ p < 0.05"],
)  # fmt: skip


def test_markdown():
    lines = markdown(HARD).splitlines()
    assert lines[2:6] == [
        "| method | a\\|b | n |",
        "|---|---:|---:|",
        "| x\\_y, k=[1] \\<b> | **1.0** + | 2–3 |",
        "| z\\* | 0.5 - |  |",
    ]


def test_latex():
    text = latex(HARD)
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    assert r"\begin{tabular}{lrr}" in text
    assert r"x\_y, k=[1] \textless{}b\textgreater{} & \textbf{1.0}\textsuperscript{+} & 2--3 \\" in text
    assert r"50\% of\_it \& more" in text
    assert r"\$5 \#3 \{a\} \textasciitilde{} \textasciicircum{} \textbackslash{}" in text
    assert all(line.count(" & ") == 2 for line in text.splitlines() if line.endswith(r" \\"))
    plain = re.sub(r"\\[\\{}]", "", text)
    assert plain.count("{") == plain.count("}")


def test_csv():
    rows = list(csv.reader(io.StringIO(comma_separated(HARD))))
    assert rows == [["method", "a|b", "n"], ["x_y, k=[1] <b>", "1.0 +", "2–3"], ["z*", "0.5 -", ""]]


def test_rich():
    console = Console(width=100)
    with console.capture() as captured:
        console.print(rich_table(HARD))
    text = captured.get()
    assert all(word in text for word in ("x_y, k=[1] <b>", "1.0 +", "0.5 -", "[1] $5"))


def test_published_values_stand_beside_ours(tmp_path: Path):
    make_run(tmp_path / "1", task="superglue/boolq", right=14)
    make_run(tmp_path / "2", task="superglue/boolq", method="bitfit")
    sheet = reference_sheet(board(tmp_path))
    ours = [line for line in texts(sheet) if line[3] == "lora"]
    assert [line[1:7] for line in ours] == [
        ["LoRA r=32 80.0M", "68.8", "lora", "70.0", "1", "+1.2"],
        ["LoRA r=8 20.0M", "87.3", "lora", "70.0", "1", "-17.3"],
    ]
    assert [("2410.18035" in line[7], "2403.16187" in line[7]) for line in ours] == [(True, False), (False, True)]
    assert all(line[4:7] == ["–", "", ""] for line in texts(sheet) if line[3] == "–")
    assert any("not on LLaMA-2 7B" in note for note in sheet.notes)
    make_run(tmp_path / "other" / "1", task="superglue/boolq", backbone="llama2_7b")
    assert not any("not on" in note for note in reference_sheet(board(tmp_path / "other")).notes)
    make_run(tmp_path / "toy" / "1")
    assert reference_sheet(board(tmp_path / "toy")).notes == ["no published values for toy/entailment"]


def test_published_values_name_tasks_metrics_and_methods_that_exist():
    _, values = published()
    assert len(values) == 7 * 7 + 6 * 7 + 2 * 3 + 6 * 3
    known = {}
    for file in (CONFIG_DIR / "task").rglob("*.yaml"):
        task = yaml.safe_load(file.read_text())
        known[task["name"]] = task.get("metrics", ["accuracy"])
    for value in values:
        assert value.column.metric in known[value.column.task], value
        assert value.method is None or (CONFIG_DIR / "method" / f"{value.method}.yaml").exists(), value


def test_no_published_value_is_called_the_iapt_papers():
    _, values = published()
    mine = [value for value in values if value.method == "iapt"]
    assert len(mine) == 7
    assert all("re-run" in value.label and "MiLoRA" in value.source for value in mine)
    assert all("2405.18203" not in value.source for value in values)


@pytest.mark.parametrize(
    ("label", "task", "metric", "value"),
    [
        ("IAPT 83.9M as re-run for MiLoRA", "piqa", "accuracy", 77.3),
        ("LoRA", "e2e", "rouge_l", 71.2),
        ("ALoRA 20->19.6M", "squad", "qa_f1_em", 89.2),
        ("P-tuning v2 84.5M", "aqua", "final_choice", 9.63),
    ],
)
def test_published_values_as_printed(label: str, task: str, metric: str, value: float):
    [found] = [v.value for v in published()[1] if (v.label, v.column.task, v.column.metric) == (label, task, metric)]
    assert found == value
