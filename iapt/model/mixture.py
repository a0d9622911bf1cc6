"""Several adapters in one batch: every row is served by an adapter of its own, over one frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.model.edits.base import Edit, Plan, shared
from iapt.model.edits.rows import Rows, put_rows
from iapt.model.method import SoftPrompt


class RowMixture(SoftPrompt):
    """Prompt-space adapters of one layout as one method; each computes only for the rows that ask for it.

    The engine runs it like any method:

        model = AdaptedModel(backbone, RowMixture([first, second]))
        with model.method.serving([0, 1, 0]):
            model.generate(batch)                       # of three rows

    With activation checkpointing the backward pass belongs into the context too.

    Args:
        adapters: methods built for the same backbone; they may be of different kinds and sizes.

    Raises:
        UserError: no adapter, one that scores choices in its own way (its `label_scores` would run once more for
            each), one whose `num_soft_tokens` or `position` is not the first one's, and what their edits refuse.
    """

    adjusts_scores = True

    def __init__(self, adapters: Sequence[SoftPrompt]) -> None:
        super().__init__()
        if not adapters:
            raise UserError("adapters = []: a mixture needs one at least")
        self.num_soft_tokens = shared("num_soft_tokens", [adapter.num_soft_tokens for adapter in adapters])
        self.position = shared("position", [adapter.position for adapter in adapters])
        for index, adapter in enumerate(adapters):
            if adapter.scores_labels:
                raise UserError(f"adapters[{index}]: scores choices in its own way, which rows of one batch cannot")
        self.adapters = nn.ModuleList(adapters)
        self._rows = Rows()
        self._edits = _mixed(adapters, self._rows)

    @property
    def rows(self) -> Tensor | None:
        """(B,) int64, the adapter of each row of the batches to come; None outside of `serving`."""
        return self._rows.of

    @contextmanager
    def serving(self, rows: Sequence[int]) -> Iterator[None]:
        """A context in which row i of every batch is served by adapter `rows[i]`.

        Raises:
            ValueError: if there is no such adapter.
        """
        if unknown := sorted(set(rows) - set(range(len(self.adapters)))):
            raise ValueError(f"rows ask for adapters {unknown}: there are {len(self.adapters)}, numbered from 0")
        before, self._rows.of = self._rows.of, torch.tensor(rows, dtype=torch.long)
        try:
            yield
        finally:
            self._rows.of = before

    def input_embeddings(self) -> Tensor | None:
        """(B, s, d), zeros for the rows of adapters that give none; None if no adapter gives any."""
        given = [(adapter.input_embeddings(), rows) for adapter, rows in self._shares()]
        real = [e for e, _ in given if e is not None]
        if not real:
            return None
        mixed = torch.stack([torch.zeros_like(real[0])] * sum(len(rows) for _, rows in given))
        for embeddings, rows in given:
            if embeddings is not None:
                mixed = mixed.index_copy(0, rows.to(mixed.device), embeddings.to(mixed).expand(len(rows), -1, -1))
        return mixed

    def edits(self) -> Sequence[Edit]:
        """Return one edit for every kind that some adapter has; each treats a row as the edit of
        the row's adapter does.
        """
        return self._edits

    def adjust_scores(self, scores: Tensor) -> Tensor:
        """Each row's scores (B, C), as its adapter adjusts them."""
        return put_rows(scores, ((one.adjust_scores(scores[rows]), rows) for one, rows in self._shares(scores)))

    def _shares(self, batch: Tensor | None = None) -> list[tuple[SoftPrompt, Tensor]]:
        adapters = [adapter for adapter in self.adapters if isinstance(adapter, SoftPrompt)]
        return self._rows.shares(adapters, batch)


def _mixed(adapters: Sequence[SoftPrompt], rows: Rows) -> list[Edit]:
    """One edit of every kind that an adapter has, in the order in which they first come."""
    owned: list[dict[type[Edit], Edit]] = []
    for adapter in adapters:
        edits = adapter.edits()
        owned.append({type(edit): edit for edit in edits})
        if len(owned[-1]) < len(edits):
            raise ValueError(f"{type(adapter).__name__}.edits: one kind twice, {[type(e).__name__ for e in edits]}")
    kinds = dict.fromkeys(kind for edits in owned for kind in edits)
    return [_Served(rows), *(kind.mix([edits.get(kind) for edits in owned], rows) for kind in kinds)]


class _Served(Edit):
    """Looks at a batch's number of rows before anything runs: adapters without edits of their own never see it."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def begin(self, plan: Plan) -> None:
        self._rows.check(plan.mask)
