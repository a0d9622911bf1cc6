"""Where things lie. Apart from all that imports torch: completion and sweeps need not wait for it."""

from __future__ import annotations

from pathlib import Path

# Inside a wheel the folder travels within the package; in a checkout it lies beside it, where people look.
_INSIDE = Path(__file__).parents[1] / "configs"
CONFIG_DIR = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[2] / "configs"
