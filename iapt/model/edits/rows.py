"""Which adapter serves which row of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Owned = TypeVar("Owned")


class Rows:
    """The rows of the batches to come, and the adapters that serve them.

    Attributes:
        of: (B,) int64, the adapter of each row; None while nothing is served.
    """

    def __init__(self) -> None:
        self.of: Tensor | None = None

    def shares(self, owned: Sequence[Owned | None], batch: Tensor | None = None) -> list[tuple[Owned, Tensor]]:
        """Return, for every adapter that is asked for, what belongs to it and the indices of its rows on the batch's
        device.

        Args:
            owned: one thing for each adapter; rows of those that have None are left out.
            batch: (B, ...), a tensor of the batch that is served.

        Raises:
            ValueError: if nothing is served, or the batch has another number of rows.
        """
        served = self._served(batch)
        device = batch.device if batch is not None else None
        found = []
        for index, thing in enumerate(owned):
            rows = (served == index).nonzero().squeeze(1)
            if thing is not None and len(rows):
                found.append((thing, rows.to(device)))
        return found

    def check(self, batch: Tensor) -> None:
        """Raises ValueError as `shares` does."""
        self._served(batch)

    def _served(self, batch: Tensor | None) -> Tensor:
        if self.of is None:
            raise ValueError("which adapter serves which row? Call the model inside `RowMixture.serving`")
        if batch is not None and len(batch) != len(self.of):
            raise ValueError(f"the batch has {len(batch)} rows, `serving` was told of {len(self.of)}")
        return self.of


def put_rows(whole: Tensor, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Whole (B, ...) with each part (b, ...) at its rows (b,), in the dtype of the whole."""
    for part, rows in parts:
        whole = whole.index_copy(0, rows, part.to(whole.dtype))
    return whole


def put_rows_widely(whole: Tensor, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Do as `put_rows`, in the widest dtype among the values: a float32 is not cut down by its neighbours' rows."""
    for part, rows in parts:
        wide = torch.promote_types(whole.dtype, part.dtype)
        whole = whole.to(wide).index_copy(0, rows, part.to(wide))
    return whole
