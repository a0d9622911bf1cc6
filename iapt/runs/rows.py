"""JSON lines that grow while somebody works: written one by one, read again after an interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from iapt.config.errors import UserError


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line and see it on the disk before going on."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """The rows of a file, none if there is no file.

    Args:
        path: JSON lines; empty lines are skipped.
        whole: False takes an end without a newline for a line that an interruption cut, and takes it off the file.

    Raises:
        UserError: a line that is no JSON object.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if not whole and end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
        data = data[:end]
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is {type(row).__name__}, a JSON object is expected")
        rows.append(row)
    return rows
