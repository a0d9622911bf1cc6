"""The table of what holds, made from a run of the contract tests: a pytest plugin.

    python -m pytest --full -p tests.contracts.table tests/contracts --contract-table docs/contract.md

Rows are families of cases (a method, two that build one model, or a type of peft's) taken together, columns the
invariants, `test_N_...` belonging to invariant N; a cell counts the shapes on which everything passed. The table goes
between two markers of the file.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contracts.conftest import CASES, SHAPES, family

PAGE = Path(__file__).resolve().parents[2] / "docs" / "contract.md"
START, END = "<!-- contract -->\n", "<!-- /contract -->"
WORKS_ON_SHAPES = 12  # has no test of its own: a shape counts if all that ran on it passed
NUMBERS = range(1, 14)
_ROWS = {case.id: " ".join(filter(None, (", ".join((case.method, *case.also)), family(case)[1]))) for case in CASES}
ROWS = list(dict.fromkeys(_ROWS.values()))


@dataclass(frozen=True)
class Result:
    """One phase of one test: `outcome` is pytest's, `reason` why it was skipped."""

    row: str
    number: int
    shape: str
    outcome: str
    reason: str = ""


def parse(nodeid: str) -> tuple[str, int, str] | None:
    """(row, invariant, shape) of `...::test_N_what[CASE-SHAPE]`, None for any other test."""
    found = re.search(r"::test_(\d+)_\w+\[(.*)-(\w+)\]$", nodeid)
    if not found or found[2] not in _ROWS or found[3] not in SHAPES:
        return None
    return _ROWS[found[2]], int(found[1]), found[3]


def render(results: Iterable[Result]) -> str:
    """The table in Markdown, its footnotes below."""
    outcomes: dict[tuple[str, int], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    reasons: dict[tuple[str, int], set[str]] = defaultdict(set)
    for result in results:
        for number in {result.number, WORKS_ON_SHAPES}:
            outcomes[result.row, number][result.shape].add(result.outcome)
        if result.outcome == "skipped":
            reasons[result.row, result.number].add(result.reason)
    letters: dict[str, str] = {}

    def cell(row: str, number: int) -> str:
        shapes = outcomes[row, number].values()
        failed = any("failed" in seen for seen in shapes)
        passed = sum("passed" in seen and "failed" not in seen for seen in shapes)
        notes = []
        for reason in sorted(reasons[row, number]):
            notes.append(f"({letters.setdefault(reason, _letter(len(letters)))})")
        counted = f"{passed}/{len(SHAPES)}" if passed else ""
        return " ".join(part for part in ("x" if failed else "", counted, *notes) if part) or "-"

    lines = [f"| | {' | '.join(map(str, NUMBERS))} |", f"|---|{'---|' * len(NUMBERS)}"]
    lines += [f"| `{row}` | {' | '.join(cell(row, number) for number in NUMBERS)} |" for row in ROWS]
    notes = [f"- ({letter}) {reason}" for reason, letter in letters.items()]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _letter(index: int) -> str:
    return chr(ord("a") + index) if index < 26 else f"a{chr(ord('a') + index - 26)}"


def write(text: str, page: Path) -> None:
    """Put the table between the markers of a page."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}{text}{END}{after}", encoding="utf-8")


class Recorder:
    """Keeps what every test came to; lives on the process that hears of all of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: list[Result] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup that passes says nothing; setup that fails or skips is the test's outcome."""
        where = parse(report.nodeid)
        if where is None or (report.when != "call" and report.passed):
            return
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        self.results.append(Result(*where, report.outcome, reason))

    def pytest_sessionfinish(self) -> None:
        """Nothing is written if nothing ran."""
        if self.results:
            write(render(self.results), self.path)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that asks for the table."""
    parser.addoption(
        "--contract-table", type=Path, help="put the table of the contract between the markers of this page"
    )


def pytest_configure(config: pytest.Config) -> None:
    """With xdist the workers report to one process, which alone writes."""
    path = config.getoption("--contract-table")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path))
