"""Checks of configurations against the schemas of all registered methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from iapt.config import check
from iapt.config.method import MethodConfig
from iapt.config.schema import Config
from iapt.methods.registry import METHODS


def load_config(composed: DictConfig | dict[str, Any], schema: type[Any] = Config) -> Any:
    """Check a composed configuration; see `iapt.config.check.load_config`."""
    return check.load_config(composed, _schemas(), schema)


def method_config(settings: Mapping[str, Any]) -> MethodConfig:
    """Check the settings of a method by themselves; see `iapt.config.check.method_config`."""
    return check.method_config(settings, _schemas())


def unknown_keys(partial: dict[str, Any], also: tuple[str, ...] = ()) -> list[str]:
    """List the keys that the schema lacks; see `iapt.config.check.unknown_keys`."""
    return check.unknown_keys(partial, _schemas(), also)


def _schemas() -> dict[str, type[MethodConfig]]:
    return {kind: spec.config for kind, spec in METHODS.items()}
