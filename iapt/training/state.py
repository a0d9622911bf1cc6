"""The state that an interrupted run continues from: optimiser, schedule, random states, best adapter so far.

It stands in state/latest.pt, and is gone once the run has finished.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from iapt.config.errors import UserError
from iapt.folder.names import STATE


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace the run's resumable state in one step."""
    path = folder / STATE
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state to continue from, on the CPU; None if the run never saved one.

    Raises:
        UserError: if the file cannot be read.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be read, so this run cannot be resumed: {error}") from error


def drop_state(folder: Path) -> None:
    """Delete the resumable state of a run that has finished."""
    (folder / STATE).unlink(missing_ok=True)
    if (folder / STATE).parent.is_dir():
        (folder / STATE).parent.rmdir()
