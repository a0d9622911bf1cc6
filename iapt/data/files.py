"""Local files to rows: jsonl, json, csv, tsv, parquet and txt, with the file and the line in every message.

A row has what the file says and nothing else: what a reader would drop or join in silence is refused.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from iapt.config.errors import UserError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]{8,})?")
# A quoted field as csv writers make it: quotation marks around it, every one inside it twice.
_DOUBLED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


def split_of(path: Path) -> str:
    """The split that a file holds: its name without suffix, and without `-00000-of-00001`, as the hub names shards."""
    shard = _SHARD.fullmatch(path.stem)
    return shard["split"] if shard else path.stem


def in_order(files: Iterable[Path]) -> list[Path]:
    """The shards of one split in their order.

    Raises:
        UserError: two files that are no shards of each other, a shard that is missing.
    """
    files = sorted(files)
    shards = {path: shard for path in files if (shard := _SHARD.fullmatch(path.stem))}
    names = ", ".join(path.name for path in files)
    kinds = {(shard["count"], path.suffix) for path, shard in shards.items()}
    places = {int(shard["number"]): path for path, shard in shards.items()}
    if len(places) < len(files) or len(kinds) != 1:
        raise UserError(f"{len(files)} files in {files[0].parent} ({names}); keep one")
    count = int(kinds.pop()[0])
    if missing := [number for number in range(count) if number not in places]:
        raise UserError(
            f"{len(files)} of {count} shards in {files[0].parent} ({names}); number {missing[0]} is missing"
        )
    return [places[number] for number in sorted(places)]


def read_file(path: Path, quotes: str = "auto") -> list[Row]:
    """The rows of one file.

    In csv and tsv every value is text, or null where the cell is empty; the first line names the columns. A
    `.json` file holds one array of objects, or one object a line as `datasets` writes it. The texts between the
    empty lines of a txt file are rows with a column `text`. Not a number, as JSON's NaN, is null.

    Args:
        path: the file.
        quotes: what quotation marks in csv and tsv are: around fields (`csv`), `literal` text, or, with `auto`,
            csv's in csv and text in tsv, except where a tsv can only be one that a csv writer wrote.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # type: ignore[import-untyped]

            _refuse_repeated(path, pyarrow.parquet.read_schema(path).names)
            return list(without_nan(pyarrow.parquet.read_table(path).to_pylist()))
        with path.open(encoding="utf-8-sig", newline="") as handle:
            if path.suffix in (".csv", ".tsv"):
                return _tsv(path, list(handle), quotes) if path.suffix == ".tsv" else _csv(path, handle, quotes)
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


def without_nan(value: Any) -> Any:
    """The same with null for what is not a number, inside lists and objects too."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return value


def _lines(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _object(path, number, _parse(path, number, line.strip()), "line")


def _parse(path: Path, number: int, text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            again = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            raise UserError(f"{path}, line {number}: an object has '{again[0]}' twice; each column needs its own name")
        return found

    try:
        return json.loads(
            text, object_pairs_hook=once, parse_constant=lambda name: None if name == "NaN" else float(name)
        )
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number + error.lineno - 1}: not JSON: {error.msg}") from None


def _object(path: Path, number: int, row: Any, what: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{path}, {what} {number}: expected an object with columns, not {json.dumps(row)[:60]}")
    return row


def _csv(path: Path, lines: Iterable[str], quotes: str) -> list[Row]:
    return list(_table(path, lines, ",", csv.QUOTE_NONE if quotes == "literal" else csv.QUOTE_MINIMAL))


def _tsv(path: Path, lines: list[str], quotes: str) -> list[Row]:
    """GLUE's tsv files have quotation marks as text; csv writers put them around fields, and double them inside."""
    names = lines[0].rstrip("\r\n").split("\t") if lines else []
    if quotes == "auto" and all(len(name) > 1 and name[0] == name[-1] == '"' for name in names):
        quotes = "csv"  # the names of the columns too: every field is quoted
    if quotes == "csv":
        return list(_table(path, lines, "\t", csv.QUOTE_MINIMAL))
    written = quotes == "auto" and _is_written_by_csv(lines)
    try:
        literal = list(_table(path, lines, "\t", csv.QUOTE_NONE))
    except UserError as error:
        if written:  # tabs or line breaks inside quoted fields
            return list(_table(path, lines, "\t", csv.QUOTE_MINIMAL))
        if quotes == "literal" or not any('"' in line for line in lines):
            raise
        raise UserError(f"{error}; if quotation marks stand around fields, as in csv: task.source.quotes=csv") from None
    for number, row in enumerate(literal if written else (), 1):
        for value in row.values():
            if value and _DOUBLED.fullmatch(value):
                raise UserError(
                    f"{path}, row {number}: {value[:60]} is text with quotation marks, or a field quoted as in "
                    "csv; task.source.quotes=literal or task.source.quotes=csv decides"
                )
    return literal


def _is_written_by_csv(lines: list[str]) -> bool:
    """Whether a csv writer would write what a csv reader reads there, to the letter."""
    try:
        rows = list(csv.reader(lines, delimiter="\t", strict=True))
    except csv.Error:
        return False
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    return text.getvalue().rstrip("\n") == "".join(lines).replace("\r\n", "\n").rstrip("\n")


def _table(path: Path, lines: Iterable[str], delimiter: str, quoting: Literal[0, 3]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the default, 128 kB, is less than some passages
    # strict: else one stray quotation mark silently swallows the lines up to the next one
    reader = csv.DictReader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        _refuse_repeated(path, reader.fieldnames)
        for row in reader:
            if None in row or None in row.values():
                count = len(reader.fieldnames or [])
                raise UserError(f"{path}, line {reader.line_num}: expected {count} columns, as in the first line")
            yield {column: value if value.strip() else None for column, value in row.items()}
    except csv.Error as error:
        raise UserError(f"{path}, row that begins in line {reader.line_num + 1}: {error}") from None


def _refuse_repeated(path: Path, columns: Iterable[str]) -> None:
    if again := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError(f"{path}: column '{again[0]}' stands there twice; each column needs its own name")
