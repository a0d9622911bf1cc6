"""Published values beside ours, each with its source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from iapt.report.cells import Board, Column, Row
from iapt.report.sheet import Entry, Sheet, column_name, file_name, percent

FILE = Path(__file__).parent / "published_values.yaml"


@dataclass(frozen=True)
class Published:
    """One published value.

    Attributes:
        label: the row as its source prints it.
        method: the name under configs/method, None where this package has none.
        value: in percent, as printed.
    """

    label: str
    method: str | None
    column: Column
    value: float
    source: str


def published(file: Path = FILE) -> tuple[str, list[Published]]:
    """The backbone of all published values, and the values."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return str(content["backbone"]), list(_values(content))


def _values(content: dict[str, Any]) -> Iterator[Published]:
    for block in content["values"]:
        columns = [Column(c["task"], c["metric"]) for c in block["columns"]]
        for row in block["rows"]:
            for column, value in zip(columns, row["values"], strict=True):
                yield Published(row["label"], row["method"], column, value, content["sources"][block["source"]])


def reference_sheet(board: Board) -> Sheet:
    """Every published value of the board's columns, with each of our rows of that method and the difference."""
    backbone, values = published()
    header = ["task", "published row", "published", "our row", "ours", "n", "difference", "source"]
    sheet = Sheet(
        f"reference_{file_name(board.backbone)}", f"Published values on {backbone} beside ours", header, left=2
    )
    for column in board.columns:
        for value in (v for v in values if v.column == column):
            ours: list[Row | None] = [row for row in board.rows if value.method and row.method == value.method]
            for row in ours or [None]:
                cell = board.cells.get((row, column)) if row else None
                median = cell.median if cell else None
                difference = "" if median is None else f"{100 * median - value.value:+.1f}"
                told = [str(row or "–"), percent(median) or "–", str(len(cell.values)) if cell else "", difference]
                texts = [column_name(board, column), value.label, f"{value.value:g}", *told, value.source]
                sheet.lines.append([Entry(text) for text in texts])
    if not sheet.lines:
        sheet.notes.append(f"no published values for {', '.join(column_name(board, c) for c in board.columns)}")
        return sheet
    sheet.notes = [
        "in percent; ours is the median over n seeds, the difference ours less published, in points",
        "published values are context, not targets: protocols and seeds differ even between the two sources",
    ]
    if file_name(board.backbone).replace("_", "").replace("-", "").lower() != "llama27b":
        sheet.notes.append(
            f"ours ran on {board.backbone}, not on {backbone}: the difference compares backbones as well"
        )
    return sheet
