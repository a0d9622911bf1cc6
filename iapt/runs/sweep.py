"""The cells of a sweep: which configuration is which, whose folder it is, and who is at work on it.

Every run folder of a sweep holds a `cell.json` with a hash of what determines its result. A job looks its hash up
over the whole sweep directory, so it finds its cell whatever number it has this time, and runs only what is not
done yet. While a process works on a cell it holds a lock on that file, which the kernel drops when the process
ends, however it ends: nothing has to be cleaned up after a `kill -9`, and several sweeps may share a directory.

The code's version is not part of the hash: a sweep of days must survive an unrelated commit. It stands in
`cell.json` and `summary.json` instead, where a report can refuse to mix two of them.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iapt.config.fields import Role
from iapt.config.roles import role_of, younger
from iapt.config.schema import Config, to_dict
from iapt.folder.files import write_json
from iapt.folder.names import ADAPTER, CELL, CONFIG, JOBS, LOCK, META, STATE, SUMMARY
from iapt.folder.summary import FAILED, RUNNING, Summary, read_summary


@dataclass(frozen=True)
class Claim:
    """What a job holds of its cell.

    Attributes:
        folder: the cell's run folder.
        before: its summary as it was found.
        free: whether this process may work on it; False while another one does.
    """

    folder: Path
    before: Summary
    free: bool

    def settled(self, retry: bool) -> Summary | None:
        """The summary to show if there is nothing to run, else None; `retry` has failed cells run again."""
        if self.before.finished or (self.before.status == FAILED and self.free and not retry):
            return self.before
        return None if self.free else dataclasses.replace(self.before, status=RUNNING)


def cell_id(config: Config) -> str:
    """16 hexadecimal digits that stand for all of a configuration that its result depends on.

    Args:
        config: checked by `load_config`, local paths absolute. Of local data files, and of the adapters that the
            method's settings name, the content counts, not the place.
    """
    settings = {**to_dict(config), "data": _data_digest(config)}
    for path in younger(config):
        *groups, key = path.split(".")
        del functools.reduce(operator.getitem, groups, settings)[key]
    for key, folder in config.method.adapters().items():
        if folder is None:  # as where there was no such setting
            del settings["method"][key]
        else:
            settings["method"][key] = _adapter_digest(Path(folder)) or folder
    return hash_of(settings)


def hash_of(settings: dict[str, Any]) -> str:
    """The same of any nested mapping of settings, those left out that are no part of a cell's identity."""
    kept = {key: value for key, value in flatten(settings).items() if Role.IDENTITY in role_of(key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_cell(folder: Path) -> str | None:
    """The hash in the folder's `cell.json`; None if it has none."""
    try:
        return str(json.loads((folder / CELL).read_text(encoding="utf-8"))["cell"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


@contextmanager
def claim(sweep: Path, folder: Path, cell: str) -> Iterator[Claim]:
    """Find the cell's folder below `sweep`, or make `folder` its folder, and keep other processes off it.

    Args:
        sweep: the sweep directory.
        folder: what the launcher made for this job. A cell that lies elsewhere stays there, and `folder` goes if it
            is empty; if another cell lies in it, the new one gets a folder beside it.
        cell: from `cell_id`.
    """
    with _exclusive(sweep / LOCK):
        there = next((path.parent for path in sorted(sweep.rglob(CELL)) if read_cell(path.parent) == cell), None)
        if there is None:
            there = next(place for place in _places(folder) if not _is_taken(place))
            there.mkdir(parents=True, exist_ok=True)
            write_json(there / CELL, {"cell": cell, "iapt": importlib.metadata.version("iapt")})
        if there != folder and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        held = os.open(there / CELL, os.O_RDONLY)
        free = _lock(held, fcntl.LOCK_EX)
        if free:
            _lock(held, fcntl.LOCK_SH)  # the run's own process takes a share too, and may outlive this one
    try:
        yield Claim(there, read_summary(there), free)
    finally:
        os.close(held)


def share(folder: Path) -> None:
    """Hold the folder's cell, if it is one, until this process ends."""
    if (folder / CELL).is_file():
        fcntl.flock(os.open(folder / CELL, os.O_RDONLY), fcntl.LOCK_SH)


def is_held(sweep: Path, folder: Path) -> bool:
    """Whether a process is at work on the cell in `folder`."""
    if not (folder / CELL).is_file():
        return False
    with _exclusive(sweep / LOCK):  # a look is a short lock, which no job may mistake for a run
        descriptor = os.open(folder / CELL, os.O_RDONLY)
        try:
            return not _lock(descriptor, fcntl.LOCK_EX)
        finally:
            os.close(descriptor)


def note_job(sweep: Path, folder: Path, summary: Summary, ran: bool) -> None:
    """Tell whoever watches the sweep that a job ended, and whether it ran or found its cell settled."""
    keys = ("status", "task", "method", "seed", "metric", "dev", "test", "train_seconds")
    line = json.dumps({**{key: getattr(summary, key) for key in keys}, "folder": str(folder), "ran": ran}) + "\n"
    descriptor = os.open(sweep / JOBS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())  # one call, so that lines of several processes do not mix
    finally:
        os.close(descriptor)


def _places(folder: Path) -> Iterator[Path]:
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def _is_taken(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CELL, SUMMARY, STATE, CONFIG))


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _data_digest(config: Config) -> str | None:
    """Of the local files that the task is read from; None where there are none and the settings name the source."""
    if not config.data_dir or config.task.source.generator:
        return None
    from iapt.data.files import SUFFIXES  # here, because all metrics come with it

    folder = Path(config.data_dir).expanduser() / config.task.name
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    parts = [(path.name, _file_digest(path, path.stat().st_mtime_ns, path.stat().st_size)) for path in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _adapter_digest(folder: Path) -> str | None:
    """Of an adapter's files; None if it is not there."""
    files = [folder / name for name in (ADAPTER, META)]
    if not all(path.is_file() for path in files):
        return None
    parts = [_file_digest(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@functools.cache
def _file_digest(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
