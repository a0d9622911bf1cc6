"""Vectors that multiply what linear maps inside the layers put out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from iapt.model.architecture import part_of
from iapt.model.edits.base import Edit, Plan, Site, shared
from iapt.model.edits.rows import Rows, put_rows_widely


class Answer(Protocol):
    """The questions that `OutputScale` asks its method."""

    def scale(self, layer: int, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Vectors that hold for every column of their row, the instruction's and all that follow it.

        Args:
            layer: 0-based index of the decoder layer about to run.
            states: (B, N, d) hidden states of the instruction's tokens right before that layer.
            mask: (B, N) bool, False on padding.

        Returns:
            Every one of the edit's parts -> (B, width of that map's output) in any float dtype.
        """


# What is kept of a pass: layer and part of it -> (B, width).
Scales = dict[tuple[int, str], Tensor]


class OutputScale(Edit):
    """The outputs of some parts of every layer are multiplied by `method.scale`; only with `before_instruction`.

    Args:
        method: is asked once a layer, in the pass over the instruction.
        parts: some of `query`, `key`, `value`, `inner` (the feed-forward's inner linear map).
        reads: which states it is handed, as in `Edit`.
    """

    def __init__(self, method: Answer, parts: Sequence[str], reads: str = "layers") -> None:
        self.method, self.parts, self.reads = method, tuple(parts), reads

    def install(self, site: Site) -> None:
        for index, layer in enumerate(site.layers):
            for part in self.parts:
                module, columns, _ = part_of(layer, part)
                site.after(module, partial(self._multiply, (index, part), columns))

    def begin(self, plan: Plan) -> None:
        plan.kept[self] = {}

    def before_layer(self, plan: Plan, layer: int, hidden: Tensor) -> Tensor:
        if plan.slots is not None:  # in the passes over the instruction
            scales = plan.once(self, layer, partial(self._ask, plan, layer, hidden))
            plan.kept[self].update({(layer, part): scale for part, scale in scales.items()})
        return hidden

    def _ask(self, plan: Plan, layer: int, hidden: Tensor) -> dict[str, Tensor]:
        return self.method.scale(layer, plan.read(self.reads, layer, hidden), plan.mask)

    def _multiply(self, place: tuple[int, str], columns: Tensor | None, plan: Plan, output: Tensor) -> Tensor | None:
        if (scale := plan.kept.get(self, {}).get(place)) is None:
            return None
        # OPT's feed-forward sees the rows of a batch as one long row, (B Q, width).
        rows = output.view(len(scale), -1, output.shape[-1])
        scale = scale.to(output.dtype)
        if columns is not None:  # the map computes other parts as well, and they stay
            ones = scale.new_ones(len(scale), output.shape[-1])
            scale = ones.index_copy(1, columns.to(scale.device), scale)
        return (rows * scale[:, None]).view_as(output)

    def following(self, kept: Scales) -> Scales:
        """The vectors, which scale all columns to come as well."""
        return kept

    def repeat(self, kept: Scales, copies: int) -> Scales:
        return {place: scale.repeat_interleave(copies, 0) for place, scale in kept.items()}

    @classmethod
    def mix(cls, edits: Sequence[Edit | None], rows: Rows) -> OutputScale:
        parts = shared("parts", [edit.parts if isinstance(edit, OutputScale) else None for edit in edits])
        methods = [edit.method if isinstance(edit, OutputScale) else None for edit in edits]
        return cls(_Mixed(methods, parts, rows), parts, shared("reads", [edit and edit.reads for edit in edits]))


@dataclass
class _Mixed:
    methods: Sequence[Answer | None]
    parts: Sequence[str]
    rows: Rows

    def scale(self, layer: int, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        shares = self.rows.shares(self.methods, states)
        own = [(method.scale(layer, states[of], mask[of]), of) for method, of in shares]
        if not own:
            return {}
        # Rows that none scales are multiplied by 1.
        return {
            part: put_rows_widely(first.new_ones(len(states), first.shape[1]), [(one[part], of) for one, of in own])
            for part, first in own[0][0].items()
        }
