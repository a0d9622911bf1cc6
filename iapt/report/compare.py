"""Two sweeps, cell by cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from iapt.report.bootstrap import Difference, corrected, difference, explained, points
from iapt.report.cells import MUST_AGREE, Board, Cell, row_settings, state
from iapt.report.sheet import BETTER, WORSE, Entry, Sheet, column_name, file_name, mark_of, percent, told


def compare_sheets(a: list[Board], b: list[Board], names: Sequence[str], resamples: int) -> list[Sheet]:
    """A sheet for each backbone that both have: means of A and B, B - A and its interval.

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
    header = ["task", "method", "A", "n", "B", "n", "B - A", "95% interval", "p", "p (Holm)"]
    sheet = Sheet(f"compare_{file_name(a.backbone)}", f"A and B on {a.backbone}", header, left=2)
    both = Board(a.backbone, [], sorted({*a.columns, *b.columns}), {}, [])
    pairs = {
        (row, column): (a.cells.get((row, column)), b.cells.get((row, column)))
        for column in both.columns
        for row in dict.fromkeys([*a.rows, *b.rows])
        if (row, column) in a.cells or (row, column) in b.cells
    }
    tests = corrected(
        {
            (row, column): difference(right.finished, left.finished, column.metric, resamples)
            for (row, column), (left, right) in pairs.items()
            if left and right and left.values and right.values
        }
    )
    reasons: list[str] = []
    for (row, column), (left, right) in pairs.items():
        name, test = column_name(both, column), tests.get((row, column))
        line = [Entry(text) for text in (name, str(row), *_told(left), *_told(right))]
        if left and right and isinstance(test, Difference):
            value, *rest = told(test)
            line += [Entry(value, mark=mark_of(test)), *map(Entry, rest)]
        elif left and right and test:
            assert left.mean is not None
            assert right.mean is not None
            line += map(Entry, (points(right.mean - left.mean), "none", "", ""))
            reasons.append(f"no interval for {row}, {name}: {test}")
        else:
            line += [Entry("")] * 4
        if left and right and test:
            reasons += [f"{row}, {name}: {text}" for text in _unlike(left, right)]
        reasons += [f"{row}, {name}: {r}" for cell in (left, right) if cell for r in cell.reasons]
        sheet.lines.append(line)
    sheet.notes = [
        f"A is {names[0]}, B is {names[1]}; means over n seeds of the test value, in percent; difference in points",
        f"{BETTER} / {WORSE}: {explained('that of A')}",
        *dict.fromkeys([*reasons, *a.notes, *b.notes]),
    ]
    return sheet


def _told(cell: Cell | None) -> tuple[str, str]:
    if cell is None or not cell.values:
        return state(cell), "0"
    return percent(cell.mean), str(len(cell.values))


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
