"""Fields of a schema that say which values they take."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def choice(default: Any, *allowed: Any) -> Any:
    """A field that takes one of `allowed`."""
    return field(default=default, metadata={"choices": allowed})


def at_least(default: Any, minimum: float) -> Any:
    """A number field with a lower bound (null stays allowed where the type allows it)."""
    return field(default=default, metadata={"minimum": minimum})
