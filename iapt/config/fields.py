"""Fields of a schema that say which values they take, and what hangs on them."""

from __future__ import annotations

from dataclasses import field
from enum import Flag, auto
from typing import Any


class Role(Flag):
    """What a setting matters for; `iapt.config.roles` reads it.

    A field without a role has that of its group, whose own field says `metadata={"role": ...}`.
    """

    IDENTITY = auto()  # another value makes another cell of a sweep
    MAY_DIFFER = auto()  # a resumed run may have another value: it changes nothing of what is computed
    ROW = auto()  # another value gives a method another row in a report
    AGREE = auto()  # runs in one cell of a report must agree in it
    ELSEWHERE = 0  # none of it: something else stands for the setting


COSMETIC = Role.MAY_DIFFER  # and nothing besides: no result hangs on it


def setting(default: Any, role: Role | None = None, *, younger: bool = False, **metadata: Any) -> Any:
    """A field of any value.

    Args:
        default: its value where nothing is said.
        role: what it matters for; None: as its group.
        younger: sweeps were begun without it. At its default, which says what held then, it is left out of a cell's
            id, so that such a sweep keeps its cells.
        metadata: what else the checks want to know.
    """
    roles = {} if role is None else {"role": role}
    return field(default=default, metadata={**metadata, **roles, "younger": younger})


def choice(default: Any, *allowed: Any, role: Role | None = None, younger: bool = False) -> Any:
    """A field that takes one of `allowed`."""
    return setting(default, role, younger=younger, choices=allowed)


def at_least(default: Any, minimum: float, role: Role | None = None, younger: bool = False) -> Any:
    """A number field with a lower bound (null stays allowed where the type allows it)."""
    return setting(default, role, younger=younger, minimum=minimum)
