"""Two sweeps, cell by cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from iapt.report.bootstrap import LEVEL, Difference, of_medians
from iapt.report.cells import MUST_AGREE, Board, Cell, row_settings, state
from iapt.report.runs import Run
from iapt.report.sheet import BETTER, WORSE, Entry, Sheet, column_name, file_name, percent


def compare_sheets(a: list[Board], b: list[Board], names: Sequence[str], resamples: int) -> list[Sheet]:
    """A sheet for each backbone that both have: medians of A and B, B - A and its interval.

    Args:
        names: what A and B are called, their folders.
    """
    sheets = []
    found = {board.backbone: board for board in b}
    for board in a:
        if board.backbone in found:
            sheets.append(_sheet(board, found.pop(board.backbone), names, resamples))
        else:
            sheets.append(_alone(board, names[0]))
    return sheets + [_alone(board, names[1]) for board in found.values()]


def _alone(board: Board, where: str) -> Sheet:
    note = f"backbone {board.backbone}: only in {where}, nothing to compare"
    return Sheet(f"compare_{file_name(board.backbone)}", f"A and B on {board.backbone}", ["task"], [], [note])


def _sheet(a: Board, b: Board, names: Sequence[str], resamples: int) -> Sheet:
    interval = f"{100 * (1 - LEVEL):.0f}% interval"
    header = ["task", "method", "A", "n", "B", "n", "B - A", interval]
    sheet = Sheet(f"compare_{file_name(a.backbone)}", f"A and B on {a.backbone}", header, left=2)
    reasons: list[str] = []
    both = Board(a.backbone, [], sorted({*a.columns, *b.columns}), {}, [])
    for column in both.columns:
        for row in dict.fromkeys([*a.rows, *b.rows]):
            left, right = a.cells.get((row, column)), b.cells.get((row, column))
            if left is None and right is None:
                continue
            name = column_name(both, column)
            line = [name, str(row), *_told(left), *_told(right)]
            test = of_medians(_finished(right), _finished(left), column.metric, resamples)
            mark, difference, ends = "", "", ""
            if left and right and left.median is not None and right.median is not None:
                difference = f"{100 * (right.median - left.median):+.1f}"
                if isinstance(test, Difference):
                    ends = f"{100 * test.low:+.1f} to {100 * test.high:+.1f}"
                    mark = BETTER if test.low > 0 else WORSE if test.high < 0 else ""
                else:
                    ends = "none"
                    reasons.append(f"no interval for {row}, {name}: {test}")
                reasons += [f"{row}, {name}: {text}" for text in _unlike(left, right)]
            reasons += [f"{row}, {name}: {r}" for cell in (left, right) if cell for r in cell.reasons]
            sheet.lines.append([*map(Entry, line), Entry(difference, mark=mark), Entry(ends)])
    sheet.notes = [
        f"A is {names[0]}, B is {names[1]}; medians over n seeds of the test value, in percent; difference in points",
        f"intervals: bootstrap percentiles of the difference of medians, drawing test examples (the same for A and B) "
        f"and seeds; {BETTER} / {WORSE}: all of the interval is above / below 0",
        *dict.fromkeys([*reasons, *a.notes, *b.notes]),
    ]
    return sheet


def _told(cell: Cell | None) -> tuple[str, str]:
    if cell is None or not cell.values:
        return state(cell), "0"
    return percent(cell.median), str(len(cell.values))


def _finished(cell: Cell | None) -> list[Run]:
    return cell.finished if cell else []


def _unlike(a: Cell, b: Cell) -> Iterable[str]:
    """What else differs between the runs of two cells."""
    for key in MUST_AGREE:
        one, other = ({run.circumstances.get(key) for run in cell.finished} - {None} for cell in (a, b))
        if one and other and one != other:
            yield f"{key} {_words(one)} in A, {_words(other)} in B"
    left, right = ([row_settings(run) for run in cell.finished] for cell in (a, b))
    for key in dict.fromkeys(k for settings in (*left, *right) for k in settings):
        one, other = {s.get(key) for s in left}, {s.get(key) for s in right}
        if one != other:
            yield f"{key} = {_words(one)} in A, {_words(other)} in B"


def _words(values: Iterable[str | None]) -> str:
    return " / ".join(sorted(str(v) for v in values))
