"""Reading and writing the files of a folder, so that nobody ever meets half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from iapt.config.errors import UserError
from iapt.folder.names import CONFIG, SUMMARY


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader, or a crash, never meets half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # several ranks may write the same file
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines at once."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a file that grows while somebody works, and see it on the disk before going on."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    """The rows of a file that is to be continued, none if there is no file.

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


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file up to the first that is cut off or damaged, without touching it; none if there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    records = []
    # Not splitlines, which also splits at the line separators that a text inside a record may hold.
    for line in filter(None, text.split("\n")):
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def run_folders(root: Path) -> set[Path]:
    """Every run folder at or below `root`."""
    return {path.parent for name in (CONFIG, SUMMARY) for path in root.rglob(name)}


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in the folder's `config.yaml`, {} if there is none.

    Raises:
        UserError: a file that cannot be read, or that is no mapping.
    """
    path = folder / CONFIG
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of settings")
    return content


def write_config(folder: Path, settings: dict[str, Any]) -> None:
    """Write `config.yaml`."""
    (folder / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
