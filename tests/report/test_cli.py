"""`iapt-report` as a command: what it prints and writes, what it refuses, and that it leaves run folders alone."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iapt.cli import report
from iapt.config.errors import UserError
from tests.report.folders import make_run, make_sweep


def digest(root: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(report.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "iapt.cli.report", *arguments],
        cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300,
    )  # fmt: skip


def test_the_files_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    sweep = make_sweep(tmp_path / "sweep")
    before = digest(sweep)
    monkeypatch.chdir(tmp_path)
    report.run(["sweep", "--baseline", "lora", "--show", "median,range", "--reference"])
    out, err = capsys.readouterr()
    assert "95.0 (range 90.0–95.0) +" in out
    assert "no published values" in out
    assert "not drawn: Test value by number of soft tokens" in err
    assert digest(sweep) == before
    names = {str(p.relative_to(tmp_path / "report")) for p in (tmp_path / "report").rglob("*") if p.is_file()}
    tables = {
        f"{name}_tiny.{suffix}" for name in ("table", "reference", "differences") for suffix in ("md", "tex", "csv")
    }
    pictures = {f"plots/{name}_tiny.png" for name in ("learning_curves", "parameters", "cost")}
    learned = {f"plots/activations_iapt_toy-{task}_tiny.png" for task in ("entailment", "sentiment")}
    assert names == tables | pictures | learned | {"cells.csv", "report.html", "manifest.json"}

    rows = list(csv.DictReader((tmp_path / "report" / "cells.csv").open()))
    assert len(rows) == 4
    [best] = [row for row in rows if (row["method"], row["task"]) == ("iapt", "toy/entailment")]
    assert (best["n"], best["median"], best["min"], best["max"]) == ("3", "0.95", "0.9", "0.95")
    assert float(best["difference"]) == pytest.approx(0.35)
    assert float(best["p"]) < 0.05
    assert len(best["folders"].split(" | ")) == 3


@pytest.mark.parametrize(("name", "word"), [("markdown", "|---|---:|"), ("latex", r"\toprule"), ("csv", "method,toy/")])
def test_formats_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, word: str):
    report.run([str(make_sweep(tmp_path / "sweep")), "--format", name, "--out", str(tmp_path / "out")])
    assert word in capsys.readouterr().out


def test_a_second_report_replaces_the_first_and_nothing_else(tmp_path: Path):
    sweep, out = make_sweep(tmp_path / "sweep"), tmp_path / "out"
    report.run([str(sweep), "--out", str(out), "--reference"])
    (out / "notes.txt").write_text("mine")
    report.run([str(sweep), "--out", str(out)])
    assert not (out / "reference_tiny.md").exists(), "of a report that is no more"
    assert (out / "notes.txt").read_text() == "mine"
    assert set(json.loads((out / "manifest.json").read_text())) == {
        str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and p.name not in ("notes.txt", "manifest.json")
    }


@pytest.mark.parametrize("foreign", ["unknown", "edited", "folder", "manifest"])
def test_foreign_files_are_not_overwritten(tmp_path: Path, foreign: str):
    sweep, out = make_sweep(tmp_path / "sweep"), tmp_path / "out"
    out.mkdir()
    if foreign == "unknown":
        (out / "table_tiny.md").write_text("mine")
    elif foreign == "folder":
        (out / "table_tiny.md").mkdir()
    elif foreign == "manifest":
        (out / "manifest.json").write_text('{"../sweep/0/summary.json": "x"}')
    else:
        report.run([str(sweep), "--out", str(out)])
        (out / "table_tiny.md").write_text("edited by hand")
    before = digest(tmp_path)
    with pytest.raises(UserError, match="nothing was changed") as error:
        report.run([str(sweep), "--out", str(out)])
    assert ("manifest.json" if foreign == "manifest" else "table_tiny.md") in str(error.value)
    assert digest(tmp_path) == before


@pytest.mark.parametrize("place", ["sweep/0", "sweep/0/report", "sweep/0/metrics.jsonl"])
def test_nothing_is_written_into_a_run_folder(tmp_path: Path, place: str):
    sweep = make_sweep(tmp_path / "sweep")
    before = digest(tmp_path)
    with pytest.raises(UserError, match=f"--out = {tmp_path / place}: lies in the run folder"):
        report.run([str(sweep), "--out", str(tmp_path / place)])
    assert digest(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one or more FOLDERs, or --compare A B"),
        (["sweep", "--compare", "a", "b"], "not both"),
        (["nowhere"], "nowhere: no such folder"),
        (["sweep", "--format", "latx"], "--format = latx: unknown; did you mean 'latex'?"),
        (["sweep", "--show", "median,spread"], "--show = spread: unknown; .*median"),
        (["sweep", "--allow-mixed", "data"], "--allow-mixed = data: unknown"),
        (["sweep", "--baseline", "loar"], "--baseline = loar: no such row; did you mean 'lora'?"),
        (["sweep", "--resamples", "5"], "--resamples = 5: must be at least 100"),
        (["sweep", "--resamples", "x"], "--resamples: invalid int value: 'x'"),
        (["sweep", "--colour"], "unrecognized arguments: --colour"),
        (["--compare", "sweep", "sweep", "--baseline", "lora"], "--baseline: has no meaning with --compare"),
    ],
)
def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str):
    make_sweep(tmp_path / "sweep")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        report.run(arguments)
    assert not (tmp_path / "report").exists()


def test_a_baseline_with_several_rows_must_be_named(tmp_path: Path):
    for i, steps in enumerate((20, 40)):
        make_run(tmp_path / "sweep" / str(i), settings={"trainer.max_steps": steps})
    with pytest.raises(UserError, match="several rows; give one of: lora, trainer.max_steps=20; lora, trainer"):
        report.run([str(tmp_path / "sweep"), "--baseline", "lora", "--out", str(tmp_path / "out")])
    report.run([str(tmp_path), "--baseline", "lora, trainer.max_steps=20", "--out", str(tmp_path / "out")])


def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path):
    make_run(tmp_path / "sweep" / "0", seed=1)
    make_run(tmp_path / "sweep" / "1", seed=2, protocol="paper", data_fingerprint="another")
    found = command("sweep", folder=tmp_path)
    assert found.returncode == 2
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    assert "protocol: strict in sweep/0; paper in sweep/1" in found.stderr
    assert "data_fingerprint: ca30070087df662f in sweep/0; another in sweep/1" in found.stderr
    assert not (tmp_path / "report").exists()
    done = command("sweep", "--allow-mixed", "protocol", "--allow-mixed", "data_fingerprint", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mixed on request: protocol" in done.stdout


def test_two_sweeps_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = make_sweep(tmp_path / "a")
    for seed in (1, 2, 3):
        settings = {"trainer.max_steps": 99}
        make_run(tmp_path / "b" / f"l{seed}", seed=seed, right=17, settings=settings)
        make_run(tmp_path / "b" / f"i{seed}", seed=seed, right=19, method="iapt", template_hash="other")
        make_run(tmp_path / "b" / f"n{seed}", seed=seed, right=19, method="idpg")
    out = tmp_path / "out"
    report.run(["--compare", str(a), str(tmp_path / "b"), "--out", str(out)])
    rows = list(csv.reader((out / "compare_tiny.csv").open()))
    assert rows[0] == ["task", "method", "A", "n", "B", "n", "B - A", "95% interval", "p", "p (Holm)"]
    by_cell = {(row[0], row[1]): row[2:] for row in rows[1:]}
    lora = by_cell["toy/entailment", "lora"]
    assert lora[:5] == ["58.3", "3", "85.0", "3", "+26.7 +"]
    low, high = (float(end) for end in lora[5].split(" to "))
    assert 0 < low < 26.7 < high
    assert by_cell["toy/entailment", "iapt"][4] == "+1.7"
    assert by_cell["toy/entailment", "idpg"] == ["not run", "0", "95.0", "3", "", "", "", ""]
    assert by_cell["toy/sentiment", "lora"] == ["70.0", "3", "not run", "0", "", "", "", ""]
    text = capsys.readouterr().out.replace("\n", " ")
    assert "lora, toy/entailment: trainer.max_steps = 20 in A, 99 in B" in " ".join(text.split())
    assert "iapt, toy/entailment: template_hash e26fe17dfdb90362 in A, other in B" in " ".join(text.split())
    assert (out / "report.html").exists()


def test_help_needs_no_runs(tmp_path: Path):
    found = command("--help", folder=tmp_path)
    assert found.returncode == 0
    assert "--allow-mixed" in found.stdout
