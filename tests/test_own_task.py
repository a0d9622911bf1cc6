"""What docs/data.md tells a newcomer to type does what it says."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import Command
from tests.test_cli import command as command

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
[OWN_TASK] = re.findall(r"^## Bring your own task\n(.*?)(?:^##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
# A file is named last in the paragraph above its text.
FILES = {name: re.sub("^    ", "", text, flags=re.MULTILINE) for name, text in
         re.findall(r"`(my/\S+)`[^`]*:\n\n((?:    .*\n)+)", OWN_TASK)}  # fmt: skip
[COMMANDS] = re.findall(r"^```bash\n(.*?)^```", OWN_TASK, re.DOTALL | re.MULTILINE)
[PRINTED] = re.findall(r" printed .*:\n\n((?:    .*\n)+)", OWN_TASK)
TRAIN = ("hydra.searchpath=[file://my]", "task=tickets", "data_dir=my/data", "hydra.run.dir=out")


def table(text: str) -> dict[str, list[str]]:
    """The lines of a printed table: first word -> the next two."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return {words[0]: words[1:3] for words in lines}


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files and nothing else, as the current one."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IAPT_DATA_DIR", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path


@pytest.mark.full
def test_bring_your_own_task(newcomer: Path) -> None:
    assert list(FILES) == ["my/data/tickets.csv", "my/task/tickets.yaml"]
    assert len(FILES["my/task/tickets.yaml"].splitlines()) < 15
    for name in ("iapt-train", "iapt-eval", "iapt-report"):
        assert re.search(rf"^{name} ", COMMANDS, re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", COMMANDS], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    with Path("my/data/tickets.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert f"write {len(rows) - 3} more tickets" in OWN_TASK
    assert len({row["text"] for row in rows}) == len(rows)
    runs = {s["method"]: s for s in map(read, Path("outputs/tickets").glob("*/summary.json"))}
    assert {(s["task"], s["status"]) for s in runs.values()} == {("tickets", "ok")}
    [scored] = map(read, Path("outputs/eval").glob("*/summary.json"))
    assert scored["test"] == read(Path("outputs/tickets/0/summary.json"))["test"]

    shown, said = table(done.stdout.rpartition("Median over seeds")[2]), table(PRINTED)
    assert shown["method"] == said["method"] == ["tickets", "params"]
    for method, summary in runs.items():
        assert float(shown[method][0]) == round(100 * summary["test"], 1)
        assert shown[method][1] == said[method][1] == f"{summary['trainable_params']:,}"
    assert f"method={','.join(runs)} " in COMMANDS


@pytest.mark.parametrize(
    ("old", "new", "overrides", "says"),
    [
        ("", "", ["task.template='{txt}'"], "task.template needs column 'txt', which row 2 of train lacks; did"),
        ("", "", ["task.label_column=taem"], "needs column 'taem', which row 2 of train lacks; did you mean 'team'?"),
        ("toy", "garment", [], "team = 'garment' in row 2 of train is outside task.label_words; allowed are 0 (tool)"),
        ("The green kite is weak", "", [], "task.template needs column 'text', which is null in row 2 of train"),
        ("The green kite is weak", "  ", [], "task.template needs column 'text', which is null in row 2 of train"),
        (",toy", ",", [], "task.label_column needs column 'team', which is null in row 2 of train"),
        (",", ";", [], "task.label_column needs column 'team', which row 2 of train lacks; did you mean 'text;"),
        ("weak,toy", "weak", [], "tickets.csv, line 3: expected 2 columns, as in the first line"),
        ("", "", ["data_dir=my/dat"], "my/dat: no such folder"),
        ("", "", ["data_dir=my"], "my has no folder 'tickets' and no file 'tickets.csv'; known: data, task; and task."),
        ("", "", ["task.split_rule=official"], "no split 'validation' in"),
        ("", "", ["task.carve_size=1000"], "task.carve_size = 1000: 2 times that must be below the size of train, 3"),
    ],
)  # fmt: skip
def test_a_mistake_in_ones_own_task_is_one_line_and_exit_code_2(
    newcomer: Path, command: Command, old: str, new: str, overrides: list[str], says: str
) -> None:
    data = newcomer / "my/data/tickets.csv"
    data.write_text(data.read_text().replace(old, new))
    code, _, err = command(*TRAIN, "task.carve_size=1", *overrides)
    assert (code, err.count("\n")) == (2, 1), err
    assert says in err


def test_a_mistake_in_ones_own_yaml_is_named_by_its_key(newcomer: Path, command: Command) -> None:
    yaml = newcomer / "my/task/tickets.yaml"
    yaml.write_text(yaml.read_text().replace('"Ticket: {text}. Team:"', "{text}").replace("label_words", "labels"))
    code, _, err = command(*TRAIN)
    assert code == 2
    assert "  task.labels = ['tool', 'toy', 'dish']: unknown key; did you mean 'label_words'?" in err
    assert "  task.template = {'text': None}: expected str\n" in err


def test_a_file_that_is_no_yaml_is_named_with_its_line(newcomer: Path, command: Command) -> None:
    yaml = newcomer / "my/task/tickets.yaml"
    yaml.write_text(yaml.read_text().replace('"Ticket: {text}. Team:"', "Ticket: {text}"))
    code, _, err = command(*TRAIN)
    assert (code, err.count("\n")) == (2, 1), err
    assert "a config file is no YAML: mapping values are not allowed here" in err
    assert "tickets.yaml" in err
    assert "line 2" in err


def read(summary: Path) -> dict[str, Any]:
    return dict(json.loads(summary.read_text()))
