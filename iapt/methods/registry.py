"""Every method, found by looking: a module in this folder that calls `register` is a method.

Nothing outside this folder knows a method by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from iapt.config.method import MethodConfig
from iapt.data.task import Task
from iapt.model.backbone import Backbone
from iapt.model.method import Method


@dataclass(frozen=True)
class MethodSpec:
    """A registered method.

    Attributes:
        config: its schema.
        build: (config, backbone) -> the module, drawing its initial values from torch's global generator.
        count: (config, backbone) -> the number of trainable parameters in closed form; reads the shapes of a
            backbone without the method, so one on the meta device will do.
        rewrite: (config, task, seed) -> the task as this method presents it, for methods made of text.
    """

    config: type[MethodConfig]
    build: Callable[[Any, Backbone], Method]
    count: Callable[[Any, Backbone], int]
    rewrite: Callable[[Any, Task, int], Task] | None = None


METHODS: dict[str, MethodSpec] = {}


def spec_of(config: MethodConfig) -> MethodSpec:
    """The registered method that a config asks for. Raises KeyError for one that is not registered."""
    return METHODS[config.kind or config.name]


def register(name: str, spec: MethodSpec) -> None:
    """Make a method known as `method.kind: NAME`, which `method.name: NAME` implies.

    Raises:
        ValueError: if the name is taken.
    """
    if name in METHODS:
        raise ValueError(f"method {name!r} is registered twice")
    METHODS[name] = spec
