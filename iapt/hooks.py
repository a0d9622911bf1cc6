"""The hooks before each decoder layer: they write soft tokens into their columns, or record what the layers read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iapt.methods import SoftPrompt


@dataclass
class Plan:
    """What the hooks do during one pass over the decoder.

    Attributes:
        mask: (B, N) bool, the instruction's.
        slots: the columns of this pass that soft tokens are written into.
        columns: where this pass holds the instruction's states; None if `states` gives them.
        states: the instruction's states, one (B, N, d) a layer.
        record: every layer's input is appended here; nothing is written then.
    """

    mask: Tensor
    slots: slice | None = None
    columns: slice | None = None
    states: Sequence[Tensor] = ()
    record: list[Tensor] | None = None


class LayerHooks:
    """Forward pre-hooks on the decoder layers. Without a `plan` they change nothing.

    Args:
        layers: the decoder layers, in order.
        method: whose soft tokens are written; any other method, or None, has none.
    """

    def __init__(self, layers: Iterable[nn.Module], method: nn.Module | None) -> None:
        self.plan: Plan | None = None
        self._method = method
        self._handles = [
            layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan = self.plan
        if plan is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if plan.record is not None:
            plan.record.append(hidden)
            return None
        assert isinstance(self._method, SoftPrompt)
        assert plan.slots is not None
        states = hidden[:, plan.columns] if plan.columns else plan.states[index]
        soft = self._method(index, states, plan.mask, hidden[:, plan.slots])
        if soft is None:
            return None
        before, after = hidden[:, : plan.slots.start], hidden[:, plan.slots.stop :]
        hidden = torch.cat([before, soft.to(hidden.dtype), after], 1)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
