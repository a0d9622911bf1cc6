"""A sheet as rich table, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from iapt.config.visible import csv_field, visible
from iapt.report.bootstrap import Difference
from iapt.report.cells import Board, Cell, state
from iapt.report.runs import short
from iapt.report.sheet import BETTER, Entry, Sheet, Tests

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "–": "--",
    "|": r"\textbar{}", "−": "$-$",
}  # fmt: skip


def rich_table(sheet: Sheet) -> Table:
    """For a terminal; notes are the caption."""
    table = Table(
        title=escape(visible(sheet.title)), caption=escape(visible("\n".join(sheet.notes))),
        box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", caption_justify="left",
    )  # fmt: skip
    for number, name in enumerate(sheet.header):
        table.add_column(escape(visible(name)), justify="left" if number < sheet.left else "right", overflow="fold")
    for line in sheet.lines:
        table.add_row(*(_styled(entry) for entry in line))
    return table


def _styled(entry: Entry) -> str:
    text = escape(f"{entry.text}{entry.mark and ' ' + entry.mark}")
    return f"[bold]{text}[/bold]" if entry.best else text


def markdown(sheet: Sheet) -> str:
    """A pipe table, and the notes as a list."""

    def cell(entry: Entry) -> str:
        # A footnote's number stays plain: [1] is no link in any dialect as long as no link is defined.
        text = re.sub(r"([\\|*_`<])", r"\\\1", entry.text)
        bold = f"**{text}**" if entry.best else text
        return f"{bold} {entry.mark}" if entry.mark else bold

    lines = [f"### {visible(sheet.title)}", "", "| " + " | ".join(cell(Entry(name)) for name in sheet.header) + " |"]
    lines.append("|" + "|".join("---" if i < sheet.left else "---:" for i in range(len(sheet.header))) + "|")
    lines += ["| " + " | ".join(cell(entry) for entry in line) + " |" for line in sheet.lines]
    return "\n".join([*lines, "", *(f"- {cell(Entry(note))}" for note in sheet.notes)]) + "\n"


def latex(sheet: Sheet) -> str:
    """A `table` with booktabs rules; needs \\usepackage{booktabs}."""

    def cell(entry: Entry) -> str:
        text = _tex(entry.text)
        mark = rf"\textsuperscript{{{'+' if entry.mark == BETTER else '$-$'}}}" if entry.mark else ""
        return (rf"\textbf{{{text}}}" if entry.best else text) + mark

    columns = "l" * sheet.left + "r" * (len(sheet.header) - sheet.left)
    lines = [
        r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
        " & ".join(_tex(name) for name in sheet.header) + r" \\", r"\midrule",
        *(" & ".join(cell(entry) for entry in line) + r" \\" for line in sheet.lines),
        r"\bottomrule", r"\end{tabular}",
        rf"\caption{{{_tex(sheet.title)}. {_tex('. '.join(sheet.notes))}.}}", r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def comma_separated(sheet: Sheet) -> str:
    """The entries as in the other formats, without the notes; a mark stands behind its value."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(csv_field, sheet.header))
    writer.writerows(
        [csv_field(f"{entry.text}{entry.mark and ' ' + entry.mark}") for entry in line] for line in sheet.lines
    )
    return file.getvalue()


def cells_csv(boards: Sequence[Board], tests: Mapping[str, Tests]) -> str:
    """Every cell on a line of its own, unrounded: values are fractions of 1, several folders stand behind each other.

    Args:
        tests: backbone -> what `sheet.against` found on its board.
    """
    file = io.StringIO()
    columns = (
        "backbone", "method", "row", "task", "metric", "status", "n", "median", "mean", "std", "min", "max",
        "difference", "low", "high", "p", "p_holm", "reasons", "folders",
    )  # fmt: skip
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for board in boards:
        for row in board.rows:
            for column in board.columns:
                cell = board.cells.get((row, column)) or Cell(column.metric, [])
                values = cell.values
                test = tests.get(board.backbone, {}).get((row, column))
                found: tuple[object, ...] = ("",) * 5
                if isinstance(test, Difference):
                    found = (test.value, test.low, test.high, test.p, "" if test.adjusted is None else test.adjusted)
                writer.writerow(map(csv_field, [
                    board.backbone, row.method, str(row), column.task, column.metric, "ok" if values else state(cell),
                    len(values), cell.median, cell.mean, cell.std, min(values, default=""), max(values, default=""),
                    *found, " | ".join(cell.reasons), " | ".join(short(run.folder) for run in cell.runs),
                ]))  # fmt: skip
    return file.getvalue()


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in visible(text))


FORMATS: dict[str, tuple[str, Callable[[Sheet], str]]] = {
    "markdown": (".md", markdown),
    "latex": (".tex", latex),
    "csv": (".csv", comma_separated),
}
