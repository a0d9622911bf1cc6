"""Where a task's rows come from: an embedded generator, a local folder, or the hub, in this order.

A row is a plain dict, column -> value, exactly as the source has it. Local files are read with the standard
library (and pyarrow for parquet), because a message about them can then name the file and the line.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from iapt.config import TaskConfig
from iapt.errors import UserError, suggest

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def load_rows(config: TaskConfig, split: str, data_dir: str | None) -> list[Row]:
    """All rows of one split, in the source's order.

    Args:
        config: the task; `source.splits` says what the source calls the split.
        split: "train", "validation" or "test".
        data_dir: a folder holding `<task.name>/<split>.jsonl|json|csv|tsv|parquet|txt`, or such files in
            `<task.name>/<subset>` for a task with `source.subsets`, or one file `<task.name>.csv` (or the
            like), whose rows are the train split. The hub is asked when it is null or holds nothing of this
            task, and never to fill up a folder that lacks one split: a task whose splits come from two
            places is no longer the task.

    Raises:
        UserError: nothing to load from, two places to load from, a missing or empty split, an unreadable file
            (with its line).
    """
    name = config.source.splits.get(split, split)
    if config.source.generator:
        rows = _generated(config.source.generator, name)
    else:
        place = _local_place(config, data_dir)
        subsets: list[str | None] = [*config.source.subsets]
        rows = []
        for subset in subsets or [None]:
            found = _local(config, place, name, subset) if place else _hub(config, name, data_dir, subset)
            rows += [{**row, "subset": subset} for row in found] if subset else found
    if not rows:
        raise UserError(f"task '{config.name}': split '{name}' is empty")
    return rows


def _generated(generator: str, name: str) -> list[Row]:
    from iapt.tasks import toy

    try:
        return list(toy.rows(generator, name))
    except ValueError as error:  # it knows neither this generator nor our words for it
        raise UserError(f"task.source.generator = {generator}: {error}") from None


def _local_place(config: TaskConfig, data_dir: str | None) -> Path | None:
    """The task's folder, or the one file that is all there is of it."""
    if not data_dir:
        return None
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"data_dir = {data_dir}: no such folder")
    places = [root / config.name] if (root / config.name).is_dir() else []
    places += [file for suffix in SUFFIXES if (file := root / f"{config.name}{suffix}").is_file()]
    if len(places) > 1:
        raise UserError(f"task '{config.name}': found {' and '.join(map(str, places))}; keep one")
    return places[0] if places else None


def _local(config: TaskConfig, place: Path, name: str, subset: str | None) -> list[Row]:
    if place.is_file() and not subset:
        train = config.source.splits.get("train", "train")
        if name != train:
            raise _missing_split(config, name, {train}, str(place))
        return read_file(place)
    folder = place / subset if subset else place
    if not folder.is_dir():
        raise UserError(f"task '{config.name}': task.source.subsets names '{subset}', but there is no {folder}")
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    found = [p for p in files if p.stem == name]
    if not found:
        raise _missing_split(config, name, {p.stem for p in files}, str(folder))
    if len(found) > 1:
        raise UserError(
            f"task '{config.name}': split '{name}' has {len(found)} files in {folder} "
            f"({', '.join(p.name for p in found)}); keep one"
        )
    return read_file(found[0])


def _missing_split(config: TaskConfig, name: str, known: set[str], where: str) -> UserError:
    hint = ""
    for alone, rule in (("train", "carve_train_twice"), ("validation", "split_validation")):
        if known == {config.source.splits.get(alone, alone)} and config.split_rule != rule:
            hint = f"; with nothing but a {alone} split, use task.split_rule={rule}"
    return UserError(f"task '{config.name}': no split '{name}' in {where}; {suggest(name, known)}{hint}")


def _hub(config: TaskConfig, name: str, data_dir: str | None, subset: str | None) -> list[Row]:
    source, configuration = config.source, subset or config.source.config
    local = _nothing_local(config, data_dir) if data_dir else "data_dir (or IAPT_DATA_DIR) is not set"
    if not source.path:
        raise UserError(f"task '{config.name}': no data: {local}; and task.source.path is not set")
    import datasets  # a second of imports that local files do not need

    try:
        rows = datasets.load_dataset(source.path, configuration, split=name, revision=source.revision)
    except Exception as error:  # the hub fails in a dozen ways, each with its own class
        known = _hub_splits(error)
        if known:
            raise _missing_split(config, name, known, f"{source.path} on the hub") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f"{source.path}{f' ({configuration})' if configuration else ''}"
        raise UserError(
            f"task '{config.name}': no data\n  local files: {local}\n  hub: {where}: {reason[:300]}"
        ) from error
    return list(rows.to_list())


def _nothing_local(config: TaskConfig, data_dir: str) -> str:
    root = Path(data_dir).expanduser()
    there = [p.relative_to(root).as_posix() for p in (root / config.name).parent.glob("*")]
    return f"{data_dir} has no folder '{config.name}' and no file '{config.name}.csv'; {suggest(config.name, there)}"


def _hub_splits(error: Exception) -> set[str]:
    """The splits that exist, out of datasets' message 'Unknown split "x". Should be one of [...]'."""
    head, _, tail = str(error).partition("Should be one of [")
    if "split" not in head.lower():
        return set()
    return {word.strip(" '\"") for word in tail.partition("]")[0].split(",")} - {""}


def read_file(path: Path) -> list[Row]:
    """The rows of one jsonl, json, csv, tsv, parquet or txt file.

    In csv and tsv every value is text, or null where the cell is empty; the first line names the columns. A
    `.json` file holds one array of objects, or one object a line as `datasets` writes it. The texts between the
    empty lines of a txt file are rows with a column `text`.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # type: ignore[import-untyped]

            return list(pyarrow.parquet.read_table(path).to_pylist())
        with path.open(encoding="utf-8-sig", newline="") as handle:
            if path.suffix in (".csv", ".tsv"):
                return list(_table(path, handle))
            if path.suffix == ".txt":
                return [{"text": text} for text in re.split(r"\n\s*\n", handle.read()) if text.strip()]
            if path.suffix == ".json":
                text = handle.read()
                if text.lstrip().startswith("["):
                    return [_object(path, i, row, "entry") for i, row in enumerate(_parse(path, 1, text), 1)]
                return list(_lines(path, text.split("\n")))
            return list(_lines(path, handle))
    except UserError:
        raise
    except Exception as error:  # OSError, UnicodeDecodeError, and whatever arrow finds wrong
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:300]}") from error


def _lines(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _object(path, number, _parse(path, number, line.strip()), "line")


def _parse(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number + error.lineno - 1}: not JSON: {error.msg}") from None


def _object(path: Path, number: int, row: Any, what: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{path}, {what} {number}: expected an object with columns, not {json.dumps(row)[:60]}")
    return row


def _table(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default, 128 kB, is less than some passages
    # strict: else one stray quotation mark silently swallows the lines up to the next one
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        for row in reader:
            if None in row or None in row.values():
                count = len(reader.fieldnames or [])
                raise UserError(f"{path}, line {reader.line_num}: expected {count} columns, as in the first line")
            yield {column: value if value.strip() else None for column, value in row.items()}
    except csv.Error as error:
        raise UserError(f"{path}, row that begins in line {reader.line_num + 1}: {error}") from None
