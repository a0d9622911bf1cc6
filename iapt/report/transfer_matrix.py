"""Transfer between tasks: what runs gain that start from another task's adapter (`method.init_from`).

A matrix for each method (at its settings): rows are the tasks that the adapters were trained on, columns the tasks
they were carried to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

from iapt.report.cells import INIT_FROM, Board, Cell, Column, Row
from iapt.report.plots import Plot
from iapt.report.sheet import Entry, Sheet, column_name, file_name, percent

FRESH = "none"


@dataclass
class Matrix:
    """One method's transfer; every cell has values.

    Attributes:
        row: the method and its settings but for where it starts from.
        cells: (source task, column) -> the runs that started from that task's adapter.
        fresh: column -> the runs that started from none.
    """

    row: Row
    cells: dict[tuple[str, Column], Cell] = field(default_factory=dict)
    fresh: dict[Column, Cell] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """The tasks that adapters came from."""
        return sorted({source for source, _ in self.cells})

    @property
    def columns(self) -> list[Column]:
        """The tasks that adapters were carried to, with their metrics."""
        return sorted({column for _, column in self.cells})

    def gain(self, source: str, column: Column) -> float | None:
        """The median above the fresh runs' median, a fraction of 1; None if either is missing."""
        cell, fresh = self.cells.get((source, column)), self.fresh.get(column)
        if cell is None or fresh is None or cell.median is None or fresh.median is None:
            return None
        return cell.median - fresh.median


def matrices(board: Board) -> list[Matrix]:
    """A matrix for each method that has finished runs with `method.init_from`."""
    found: dict[Row, Matrix] = {}
    for (row, column), cell in board.cells.items():
        if not cell.values:
            continue
        base = Row(row.method, tuple(setting for setting in row.variant if setting[0] != INIT_FROM))
        matrix = found.setdefault(base, Matrix(base))
        source = cell.finished[0].init_from  # of all of them: where it differs, rows do
        if source is None:
            matrix.fresh[column] = cell
        else:
            matrix.cells[source, column] = cell
    return [matrix for matrix in found.values() if matrix.cells]


def transfer_sheets(board: Board) -> list[Sheet]:
    """A table for each matrix."""
    return [_sheet(board, matrix) for matrix in matrices(board)]


def transfer_plots(board: Board) -> list[Plot]:
    """A picture of each matrix, or why there is none."""
    title, suffix = "Transfer: gain of starting from another task's adapter", file_name(board.backbone)
    made = [
        Plot(_name(board, matrix), f"{title}, {matrix.row}: points of the test value, n seeds", _draw(board, matrix))
        for matrix in matrices(board)
    ]
    why = "no finished run started from another run's adapter (method.init_from)"
    return made or [Plot(f"transfer_{suffix}", title, None, why)]


def _name(board: Board, matrix: Matrix) -> str:
    return f"transfer_{file_name(str(matrix.row))}_{file_name(board.backbone)}"


def _text(matrix: Matrix, source: str, column: Column) -> str:
    """The gain in points with its sign, or the median in percent, and the number of seeds; empty if nothing ran."""
    cell, gain = matrix.cells.get((source, column)), matrix.gain(source, column)
    if cell is None:
        return ""
    return f"{percent(cell.median) if gain is None else f'{100 * gain:+.1f}'} (n {len(cell.values)})"


def _sheet(board: Board, matrix: Matrix) -> Sheet:
    title = f"Transfer with {matrix.row} on {board.backbone}: rows source tasks, columns target tasks"
    header = ["source", *(column_name(board, column) for column in matrix.columns)]
    sheet = Sheet(_name(board, matrix), title, header)
    fresh = [matrix.fresh.get(column) for column in matrix.columns]
    if any(fresh):
        texts = [f"{percent(cell.median)} (n {len(cell.values)})" if cell else "not run" for cell in fresh]
        sheet.lines.append([Entry(text) for text in (FRESH, *texts)])
    for source in matrix.sources:
        texts = [_text(matrix, source, column) or "not run" for column in matrix.columns]
        sheet.lines.append([Entry(text) for text in (source, *texts)])
    sheet.notes = [
        "with a sign: points by which the median over n seeds is above the one of the same method from a fresh start; "
        f"without: the median itself, in percent{', in a column without fresh runs' if None in fresh else ''}"
    ]
    return sheet


def _draw(board: Board, matrix: Matrix) -> Figure:
    sources, columns = matrix.sources, matrix.columns
    gains = np.array(
        [[100 * (g if (g := matrix.gain(s, c)) is not None else np.nan) for c in columns] for s in sources]
    )
    figure = Figure(
        figsize=(3.6 + 1.4 * len(columns), 2.6 + 0.5 * len(sources)), layout="constrained", facecolor="white"
    )
    axes = figure.add_subplot()
    largest = max(5.0, float(np.nanmax(np.abs(gains), initial=0)))  # a small gain has a pale colour
    image = axes.imshow(gains, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    axes.set_facecolor("0.85")  # where there is nothing to subtract from, or nothing at all
    for y, source in enumerate(sources):
        for x, column in enumerate(columns):
            dark = abs(gains[y, x]) > 0.6 * largest
            axes.text(x, y, _text(matrix, source, column), ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), [column_name(board, column) for column in columns], rotation=20, ha="right")
    axes.set_yticks(range(len(sources)), sources)
    axes.set(xlabel="target task", ylabel="source task")
    axes.set_title(str(matrix.row), fontsize=9, wrap=True)
    figure.colorbar(image, label="points above a fresh start")
    return figure
