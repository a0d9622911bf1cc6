"""What each setting matters for, by its dotted key, as its field in the schema says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from iapt.config.fields import Role
from iapt.config.schema import Config


@functools.cache
def role_of(key: str) -> Role:
    """The role of "trainer.max_steps" and the like.

    A key that the schema does not know, such as a method's own setting or one of an older release, has its group's.
    """
    schema: Any = Config
    role = Role.IDENTITY
    for part in key.split("."):
        known = {f.name: f for f in dataclasses.fields(schema)} if dataclasses.is_dataclass(schema) else {}
        if part not in known:
            break
        role = known[part].metadata.get("role", role)
        schema = known[part].default_factory
    return role


def with_role(role: Role) -> list[str]:
    """The dotted keys of `Config`'s settings that have `role`, in the schema's order."""
    return [key for key, _ in _settings(Config) if role in role_of(key)]


def younger(config: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a configuration's settings that sweeps were begun without, and that say what held then."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from younger(value, f"{prefix}{f.name}.")
        elif f.metadata.get("younger") and value == f.default:
            yield f"{prefix}{f.name}"


def _settings(schema: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.default_factory):
            yield from _settings(f.default_factory, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f
