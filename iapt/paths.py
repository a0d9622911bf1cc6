"""Where the package's configs lie. Apart from `iapt.config`: completion need not wait for torch."""

from __future__ import annotations

from pathlib import Path

# Inside a wheel the folder travels within the package; in a checkout it lies beside it, where people look.
_INSIDE = Path(__file__).parent / "configs"
CONFIG_DIR = _INSIDE if _INSIDE.is_dir() else Path(__file__).parent.parent / "configs"
