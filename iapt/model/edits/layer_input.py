"""Soft tokens that are written in front of each decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from iapt.model.edits.base import Edit, Plan, put, shared, take
from iapt.model.edits.rows import Rows, put_rows_widely

# (layer, states (B, N, d), mask (B, N), previous (B, s, d)) -> (B, s, d), or None to leave `previous` as it is.
Answer = Callable[[int, Tensor, Tensor, Tensor], "Tensor | None"]


class LayerInput(Edit):
    """The soft columns of each layer's input are what the method answers, as in `SoftPrompt.forward`.

    Args:
        method: is called; not in layers where nothing sees the soft columns.
        reads: which states it is handed: `layers`, `encoding` or `nothing`, as in `Edit`.
    """

    def __init__(self, method: Answer, reads: str = "layers") -> None:
        self.method, self.reads = method, reads

    def before_layer(self, plan: Plan, layer: int, hidden: Tensor) -> Tensor:
        if plan.slots is None or layer in plan.hidden:
            return hidden
        soft = plan.once(self, layer, partial(self._ask, plan, plan.slots, layer, hidden))
        return hidden if soft is None else put(hidden, plan.slots, soft)

    def _ask(self, plan: Plan, slots: Tensor, layer: int, hidden: Tensor) -> Tensor | None:
        return self.method(layer, plan.read(self.reads, layer, hidden), plan.mask, take(hidden, slots))

    @classmethod
    def mix(cls, edits: Sequence[Edit | None], rows: Rows) -> LayerInput:
        methods = [edit.method if isinstance(edit, LayerInput) else None for edit in edits]

        def answer(layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor | None:
            asked = [
                (method(layer, states[of], mask[of], previous[of]), of) for method, of in rows.shares(methods, previous)
            ]
            given = [(soft, of) for soft, of in asked if soft is not None]
            return put_rows_widely(previous, given) if given else None

        return cls(answer, shared("reads", [edit and edit.reads for edit in edits]))
