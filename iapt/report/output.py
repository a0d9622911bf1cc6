"""The files of a report: checked for what they would overwrite before the first is written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from iapt.config.errors import UserError
from iapt.report.runs import Run

MANIFEST = "manifest.json"  # file -> SHA-256 of what was written, so that a file edited since is known as such


def check_out(folder: Path, runs: Sequence[Run]) -> None:
    """Raises UserError if `folder` is no place for a report: a run folder, inside one, or a file."""
    place = folder.resolve()
    for run in runs:
        if run.folder in (place, place / "plots", *place.parents):
            raise UserError(f"--out = {folder}: lies in the run folder {run.folder}, which a report never writes into")
    if place.exists() and not place.is_dir():
        raise UserError(f"--out = {folder}: is a file; give a folder")


def write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write `files` into `folder`, and drop those of an earlier report that this one has not.

    Args:
        folder: made if missing.
        files: name -> content; a name may begin with a sub-folder.

    Raises:
        UserError: a file would be overwritten that no report wrote, or that was changed since; nothing is written.
    """
    earlier = _manifest(folder)
    there = [name for name in sorted({*files, *earlier}) if (folder / name).exists()]
    foreign = [name for name in there if name not in earlier or _digest(folder / name) != earlier[name]]
    if foreign:
        raise UserError(
            f"--out = {folder}: not written by iapt-report, or changed since: {', '.join(foreign)}; "
            "nothing was changed, choose another folder"
        )
    try:
        for name in earlier.keys() - files.keys():
            (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, content)
            # At once, so that after a crash these files are still known as a report's.
            earlier[name] = hashlib.sha256(content).hexdigest()
            _replace(folder / MANIFEST, json.dumps({n: earlier[n] for n in sorted(earlier)}, indent=1).encode())
        kept = {name: earlier[name] for name in sorted(files)}
        _replace(folder / MANIFEST, json.dumps(kept, indent=1).encode())
    except OSError as error:
        raise UserError(f"--out = {folder}: cannot be written: {error}") from None
    return [folder / name for name in files]


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict) and all(_inside(name) and isinstance(d, str) for name, d in content.items()):
        return dict(content)
    raise UserError(f"--out = {folder}: its {MANIFEST} is not one of iapt-report; nothing was changed")


def _inside(name: str) -> bool:
    return bool(Path(name).name) and ".." not in Path(name).parts and not Path(name).is_absolute()


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)
