"""A table as its entries, before it is rendered in any format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from iapt.config.visible import visible
from iapt.report.bootstrap import Difference, Tested, corrected, difference, explained, interval, points
from iapt.report.cells import Board, Cell, Column, Row, state

LOWER_IS_BETTER = ("ece",)
SHOWN = ("median", "mean", "std", "n", "range")
BETTER, WORSE = "+", "-"


@dataclass(frozen=True)
class Entry:
    """One entry: its text, whether it is the best of its column, and `BETTER` or `WORSE` than the baseline."""

    text: str
    best: bool = False
    mark: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", visible(self.text))  # names and reasons come out of run folders


@dataclass
class Sheet:
    """A table.

    Attributes:
        name: a file name without suffix.
        lines: each as long as `header`; the first `left` columns are text, the others numbers.
        notes: below the table; a number in [brackets] in an entry refers to the note that begins with it.
    """

    name: str
    title: str
    header: list[str]
    lines: list[list[Entry]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: int = 1


Tests = dict[tuple[Row, Column], Tested]


def against(board: Board, baseline: Row, resamples: int) -> Tests:
    """Every other row's difference from the baseline's, column by column, corrected over all of them."""
    found: Tests = {}
    for (row, column), cell in board.cells.items():
        reference = board.cells.get((baseline, column))
        if row != baseline and cell.values:
            runs = reference.finished if reference else []
            found[row, column] = difference(cell.finished, runs, column.metric, resamples)
    return corrected(found)


def differences_sheet(board: Board, baseline: Row, tests: Tests) -> Sheet:
    """What `against` found, a line for each test."""
    sheet = Sheet(
        f"differences_{file_name(board.backbone)}",
        f"Differences from {baseline} on {board.backbone}",
        ["method", "task", "n", "difference", "95% interval", "p", "p (Holm)"],
        left=2,
    )
    for (row, column), test in tests.items():
        if isinstance(test, Difference):
            line = [str(row), column_name(board, column), str(test.seeds), *told(test)]
            mark = mark_of(test)
            sheet.lines.append([Entry(text, mark=mark if number == 3 else "") for number, text in enumerate(line)])
    sheet.notes = [f"in points; n: seeds of the smaller group; {BETTER} / {WORSE}: {explained(f'that of {baseline}')}"]
    return sheet


def told(test: Difference) -> list[str]:
    """The difference, its interval, p and the corrected p."""
    return [points(test.value), interval(test), _probability(test.p), _probability(test.adjusted)]


def mark_of(test: Tested | None) -> str:
    """`BETTER`, `WORSE`, or nothing."""
    if not isinstance(test, Difference) or not test.significant:
        return ""
    return BETTER if test.value > 0 else WORSE


def _probability(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def main_sheet(board: Board, shown: Sequence[str], baseline: Row | None = None, tests: Tests | None = None) -> Sheet:
    """Rows methods, columns tasks, then the cost columns.

    Args:
        shown: of SHOWN, what a cell tells of its seeds.
        baseline, tests: the row that others were tested against, and the outcomes.
    """
    costs = _cost_columns(board)
    header = ["method", *(column_name(board, c) for c in board.columns), "params", *costs]
    sheet = Sheet(
        f"table_{file_name(board.backbone)}",
        f"{', '.join(shown).capitalize()} over seeds of the test value on {board.backbone}",
        header,
    )
    footnotes = _Footnotes()
    best = {column: _best(board, column) for column in board.columns}
    counts = {len(cell.values) for cell in board.cells.values() if cell.values}
    for row in board.rows:
        line = [Entry(str(row))]
        for column in board.columns:
            cell = board.cells.get((row, column))
            line.append(_entry(cell, shown, best[column], (tests or {}).get((row, column)), footnotes, len(counts) > 1))
        line.append(Entry(_parameters(board, row)))
        line += [Entry(hours(board, row, on_cpu)) for on_cpu in costs.values()]
        sheet.lines.append(line)
    sheet.notes = [_caption(board, counts, baseline), *footnotes.notes, *board.notes]
    untested = {f"{row}, {column.task}: {t}" for (row, column), t in (tests or {}).items() if isinstance(t, str)}
    sheet.notes += [f"not tested against {baseline}: {reason}" for reason in sorted(untested)]
    return sheet


def file_name(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.") or "unnamed"


def column_name(board: Board, column: Column) -> str:
    """The task, and its metric where the board has several or it is not the accuracy."""
    alone = sum(c.task == column.task for c in board.columns) == 1
    return column.task if alone and column.metric == "accuracy" else f"{column.task} {column.metric}"


def percent(value: float | None) -> str:
    """A fraction of 1 in percent; empty for None."""
    return "" if value is None else f"{100 * value:.1f}"


def statistics_of(cell: Cell) -> dict[str, str]:
    """Each of SHOWN as text, in percent; empty where there is none."""
    ends = f"{percent(min(cell.values))}–{percent(max(cell.values))}" if cell.values else ""
    return {
        "median": percent(cell.median),
        "mean": percent(cell.mean),
        "std": percent(cell.std),
        "n": str(len(cell.values)),
        "range": ends,
    }


def hours(board: Board, row: Row, on_cpu: bool) -> str:
    """The median over the row's finished runs of training time times processes, in hours; empty without any."""
    found = sorted(r.hours for r in board.finished(row) if r.on_cpu == on_cpu and r.hours is not None)
    if not found:
        return ""
    middle = (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2
    return f"{middle:.2g}" if middle < 10 else f"{middle:.0f}"


class _Footnotes:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def add(self, text: str) -> str:
        note = f"[{len(self.notes) + 1}] {text}"
        self.notes.append(note)
        return note.split()[0]


def _entry(
    cell: Cell | None, shown: Sequence[str], best: float | None, test: Tested | None, footnotes: _Footnotes,
    with_count: bool,
) -> Entry:  # fmt: skip
    word = footnotes.add("; ".join(cell.reasons)) if cell and cell.reasons else ""
    if cell is None or not cell.values:
        return Entry(f"{state(cell)} {word}".strip())
    texts = statistics_of(cell)
    parts = [texts[shown[0]] or "–"]
    rest = [*shown[1:], *(["n"] if with_count and "n" not in shown else [])]
    if rest:
        parts.append("(" + ", ".join(f"{name} {texts[name] or '–'}" for name in rest) + ")")
    return Entry(" ".join([*parts, word]).strip(), cell.median == best, mark_of(test))


def _best(board: Board, column: Column) -> float | None:
    medians = [cell.median for (_, c), cell in board.cells.items() if c == column and cell.median is not None]
    best = min if column.metric in LOWER_IS_BETTER else max
    return best(medians) if len(medians) > 1 else None


def _parameters(board: Board, row: Row) -> str:
    counts = sorted({r.summary.trainable_params for r in board.finished(row) if r.summary.trainable_params is not None})
    if not counts:
        return ""
    return f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,}–{counts[-1]:,}"


def _cost_columns(board: Board) -> dict[str, bool]:
    """Header of a cost column -> whether it is of the runs on the CPU."""
    where = {run.on_cpu for cell in board.cells.values() for run in cell.finished}
    names = {False: "GPU-hours/run", True: "compute-hours/run (CPU)"}
    return {names[on_cpu]: on_cpu for on_cpu in sorted(where)}


def _caption(board: Board, counts: set[int], baseline: Row | None) -> str:
    runs = [run for cell in board.cells.values() for run in cell.finished]
    parts = ["in percent", "best median of a column bold"]
    if len(counts) == 1:
        parts.append(f"n = {next(iter(counts))} seed{'' if counts == {1} else 's'} in every cell with a value")
    for key in (
        "protocol",
        "backbone_fingerprint",
        "versions.iapt",
        "versions.torch",
        "versions.transformers",
        "versions.peft",
    ):
        values = sorted({run.circumstances.get(key, "not recorded") for run in runs})
        parts.append(f"{key.removeprefix('versions.').replace('_', ' ')} {' / '.join(values)}")
    parts.append(f"commit {' / '.join(sorted({str(run.summary.git) for run in runs}))}")
    parts.append(f"computed on {' / '.join(sorted({str(run.summary.device) for run in runs}))}")
    if baseline:
        parts.append(f"{BETTER} / {WORSE}: {explained(f'that of {baseline}')}")
    return "; ".join(parts)
