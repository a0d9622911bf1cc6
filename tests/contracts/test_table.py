"""The table of the contract page knows every method, and `make contract` changes nothing else of the page."""

from __future__ import annotations

import re
from pathlib import Path

from iapt.methods.registry import METHODS
from tests.contracts.conftest import CASES, SHAPES
from tests.contracts.table import END, PAGE, ROWS, START, Result, parse, render, write

FIRST, SECOND = ROWS[:2]


def cells(text: str, row: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| `{row}` |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_its_rows_are_the_registered_methods():
    table = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    found = re.findall(r"^\| `(.+?)` \|", table, re.M)
    assert found == ROWS
    named = [["peft"] if row.startswith("peft ") else row.split(", ") for row in found]
    assert {name for names in named for name in names} == set(METHODS)


def test_a_failure_anywhere_takes_the_shape_away():
    results = [Result(FIRST, number, shape, "passed") for number in (1, 3) for shape in SHAPES]
    results += [
        Result(FIRST, 3, "gpt2", "failed"),  # one of several tests of this cell
        Result(FIRST, 7, "llama", "skipped", "cannot be"),
        Result(SECOND, 1, "opt", "skipped", "cannot be"),
        Result(SECOND, 1, "llama", "passed"),
    ]
    text = render(results)
    first, second = cells(text, FIRST), cells(text, SECOND)
    assert (first[0], first[1], first[2], first[6], first[11]) == ("6/6", "-", "x 5/6", "(a)", "x 5/6")
    assert (second[0], second[11]) == ("1/6 (a)", "1/6")
    assert text.endswith("|\n\n- (a) cannot be\n")


def test_only_cells_of_the_contract_are_counted():
    case = CASES[0]
    assert parse(f"a.py::test_4_what_holds[{case.id}-gpt2]") == (case.method, 4, "gpt2")
    assert parse(f"a.py::test_13_what_holds[{case.id}-llama]") == (case.method, 13, "llama")
    others = ("test_of_everything", "test_1_built[gpt2]", f"test_hooks[{case.id}-gpt2]", "test_1_x[nothing-gpt2]")
    assert [parse(f"a.py::{other}") for other in others] == [None] * 4
    assert len({case.id for case in CASES}) == len(CASES)


def test_nothing_but_the_block_changes_in_the_page(tmp_path: Path):
    page = tmp_path / "contract.md"
    page.write_text(f"before\n{START}old\n{END}\nafter\n")
    write("new\n", page)
    assert page.read_text() == f"before\n{START}new\n{END}\nafter\n"
