"""One parameter budget for all methods: `budget=20M` sets whatever decides a method's size.

Counts are closed forms over the backbone's shapes, so nothing is built to find the setting.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from iapt.config.errors import UserError
from iapt.config.method import MethodConfig
from iapt.config.schema import BUDGET, BUDGET_FORM
from iapt.methods.registry import spec_of
from iapt.model.backbone import Backbone

MOST = 1e13  # beyond any model; sizes that follow from more do not even fit an integer of torch's
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}


@dataclass(frozen=True)
class Fitted:
    """The setting that a budget led to.

    Attributes:
        asked: trainable parameters asked for.
        knob: the setting that was chosen, None if the method has none.
        value: its value.
        count: the trainable parameters this gives.
    """

    asked: int
    knob: str | None
    value: int | None
    count: int

    @property
    def off(self) -> float:
        """count / asked - 1."""
        return self.count / self.asked - 1

    def __str__(self) -> str:
        chosen = f"method.{self.knob} = {self.value} gives" if self.knob else "no setting decides this method's size:"
        return f"budget {self.asked:,}: {chosen} {self.count:,} trainable parameters ({self.off:+.1%})"

    def record(self) -> dict[str, Any]:
        """Return the mapping that `summary.json` holds."""
        return {**dataclasses.asdict(self), "off": self.off}


def parse_budget(text: str, backbone_parameters: int) -> int:
    """Read `20M`, `300k`, `1500` or `0.3%` as a number of parameters, at least 1.

    Raises:
        UserError: anything else.
    """
    found = BUDGET.fullmatch(text.strip())
    if not found:
        raise UserError(f"budget = {text!r}: expected {BUDGET_FORM}")
    number, unit = float(found[1]), found[2].lower()
    asked = number * (backbone_parameters / 100 if unit == "%" else _UNITS[unit])
    if asked > MOST:
        raise UserError(f"budget = {text!r}: {asked:.3g} parameters; allowed are at most {MOST:.0e}")
    return max(1, round(asked))


def fit_to_budget(config: MethodConfig, backbone: Backbone, asked: int) -> tuple[MethodConfig, Fitted]:
    """The config whose number of trainable parameters comes closest, and what was chosen.

    Args:
        config: its size setting is replaced, all else kept.
        backbone: without the method; its shapes decide.
        asked: trainable parameters.

    Raises:
        UserError: if the method rejects the size that the budget leads to.
    """
    knob, count = config.size_knob(), spec_of(config).count
    if knob is None:
        return config, Fitted(asked, None, None, count(config, backbone))

    def sized(steps: int) -> int:
        return count(_with_size(config, knob.field, steps * knob.step), backbone)

    high = 1
    while sized(high) < asked:
        if sized(2 * high) == sized(high):
            raise UserError(f"budget: method.{knob.field} does not change how many parameters {config.name} trains")
        high *= 2
    low = max(1, high // 2)
    while high - low > 1:  # counts grow with the setting: sized(low) < asked <= sized(high)
        middle = (low + high) // 2
        low, high = (middle, high) if sized(middle) < asked else (low, middle)
    best = min(low, high, key=lambda steps: abs(sized(steps) - asked))
    chosen = _with_size(config, knob.field, best * knob.step)
    if problems := chosen.problems():
        raise UserError(f"budget: method.{knob.field} = {best * knob.step} would fit it, but {'; '.join(problems)}")
    return chosen, Fitted(asked, knob.field, best * knob.step, sized(best))


def _with_size(config: MethodConfig, field: str, value: int) -> MethodConfig:
    name, _, key = field.partition(".")
    changed: Any = {name: {**getattr(config, name), key: value} if key else value}
    return dataclasses.replace(config, **changed)
