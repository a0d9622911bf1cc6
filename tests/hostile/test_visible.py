"""Text from data and adapters steers neither a terminal nor a spreadsheet."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from iapt.cli import report
from iapt.cli.tables import summary_table
from iapt.config.errors import ConfigError, TrainingError, UserError
from iapt.config.visible import csv_field, visible
from iapt.folder.summary import Summary
from tests.report.folders import make_run

# Clears the screen, sets the title, erases what stands before it, turns the writing around.
STEERING = "a\x1b[2Jb\x1b]0;title\x07c\rd\x08e\u202ef\x9b1m\x7f"


def test_control_characters_are_written_out() -> None:
    assert visible(STEERING) == r"a\x1b[2Jb\x1b]0;title\x07c\rd\x08e\u202ef\x9b1m\x7f"
    assert visible("line\n\ttab é 中 👍 ß") == "line\n\ttab é 中 👍 ß"


@pytest.mark.parametrize("error", [UserError(STEERING), TrainingError(STEERING), ConfigError([STEERING])])
def test_errors_steer_nothing(error: Exception) -> None:
    assert "\x1b" not in str(error)
    assert r"\x1b" in str(error)


def test_a_table_steers_nothing() -> None:
    console = Console(file=io.StringIO(), width=500)
    console.print(
        summary_table([(Path("run"), Summary(task=STEERING, method=STEERING, status="failed", reason=STEERING))])
    )
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert not set(printed) & set("\x1b\x07\r\x08\u202e\x9b\x7f")


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3+cmd", "@SUM(A1)", "+1 cmd|'/C calc'!A0", "\t=1", "\r=1"]
)
def test_formulas_are_text(text: str) -> None:
    assert csv_field(text) == f"'{visible(text)}"


@pytest.mark.parametrize(
    "value", ["-0.5", "+12", "-1.2e-05", "+6.9 [1.2, 3.4]", "-15.0 (n 2)", "iapt", "", 3, None, -1.5]
)
def test_numbers_and_names_stay(value: object) -> None:
    assert csv_field(value) == value


@pytest.mark.parametrize(
    "name", ["=HYPERLINK(1)", "<script>alert(1)</script>", "\x1b[2J", r"\input{/etc/passwd}", r"$\frac{$"]
)
def test_names_of_run_folders_do_nothing_in_a_report(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "a", method=name)
    make_run(tmp_path / "runs" / "b", method="lora", status="failed", reason=name, test=None)
    for format_ in ("rich", "markdown", "latex", "csv"):
        report.run([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--format", format_])
        assert "\x1b" not in "".join(capsys.readouterr())
    files = {
        p.name: p.read_text(encoding="utf-8")
        for p in (tmp_path / "out").rglob("*")
        if p.suffix != ".png" and p.is_file()
    }
    assert not [name for name, text in files.items() if "\x1b" in text]
    assert "<script>alert" not in files["report.html"]
    for text in (text for name, text in files.items() if name.endswith(".csv")):
        assert not [field for row in csv.reader(io.StringIO(text)) for field in row if field.startswith("=")]
    for text in (text for name, text in files.items() if name.endswith(".tex")):
        assert r"\input" not in text
        assert "$" not in text.replace(r"\$", "").replace("$-$", "")


def test_what_a_report_says_beside_its_tables_steers_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a" / "run", backbone=STEERING)
    make_run(tmp_path / "b" / "run")
    report.run(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    printed = "".join(capsys.readouterr())
    assert "nothing to compare" in printed
    assert not set(printed) & set("\x1b\x07\r\x08\u202e\x9b\x7f")
