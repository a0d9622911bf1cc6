"""Several adapters in one batch: every row is served by an adapter of its own, over one frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.model.method import SoftPrompt

_SHARED = (
    "num_soft_tokens", "position", "reads", "hides", "masked_layers", "edits_cache", "edits_embeddings", "scales",
)  # fmt: skip


class RowMixture(SoftPrompt):
    """Prompt-space adapters of one layout as one method; each computes only for the rows that ask for it.

    The engine runs it like any method:

        model = AdaptedModel(backbone, RowMixture([first, second]))
        with model.method.serving([0, 1, 0]):
            model.generate(batch)                       # of three rows

    With activation checkpointing the backward pass belongs into the context too.

    Args:
        adapters: methods built for the same backbone; they may be of different kinds and sizes.

    Attributes:
        rows: (B,) int64, the adapter of each row of the batches to come; None outside of `serving`.

    Raises:
        UserError: no adapter, one that scores choices in its own way (its `label_scores` would run once more for
            each), or one whose layout (`num_soft_tokens`, `position`, `reads`, `hides`, `masked_layers`, `edits_cache`,
            `edits_embeddings`, `scales`) is not the first one's.
    """

    adjusts_scores = True

    def __init__(self, adapters: Sequence[SoftPrompt]) -> None:
        super().__init__()
        if not adapters:
            raise UserError("adapters = []: a mixture needs one at least")
        for name in _SHARED:
            wanted = getattr(adapters[0], name)
            for index, adapter in enumerate(adapters):
                if getattr(adapter, name) != wanted:
                    raise UserError(
                        f"adapters[{index}].{name} = {getattr(adapter, name)!r}: adapters of one batch share it, "
                        f"and adapters[0] has {wanted!r}"
                    )
            setattr(self, name, wanted)
        for index, adapter in enumerate(adapters):
            if adapter.scores_labels:
                raise UserError(f"adapters[{index}]: scores choices in its own way, which rows of one batch cannot")
        self.adapters = nn.ModuleList(adapters)
        self.rows: Tensor | None = None

    @contextmanager
    def serving(self, rows: Sequence[int]) -> Iterator[None]:
        """A context in which row i of every batch is served by adapter `rows[i]`.

        Raises:
            ValueError: if there is no such adapter.
        """
        if unknown := sorted(set(rows) - set(range(len(self.adapters)))):
            raise ValueError(f"rows ask for adapters {unknown}: there are {len(self.adapters)}, numbered from 0")
        before, self.rows = self.rows, torch.tensor(rows, dtype=torch.long)
        try:
            yield
        finally:
            self.rows = before

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

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor | None:
        """As `SoftPrompt.forward`. Raises ValueError outside of `serving`, or for a batch of another size."""
        changed = False
        mixed = previous
        for adapter, rows in self._shares(previous):
            soft = adapter(layer, states[rows], mask[rows], previous[rows])
            if soft is not None:
                changed = True
                # As wide as the widest answer: an adapter's float32 is not cut down by its neighbours' rows.
                wide = torch.promote_types(mixed.dtype, soft.dtype)
                mixed = mixed.to(wide).index_copy(0, rows, soft.to(wide))
        return mixed if changed else None

    def keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `SoftPrompt.keys_values`. Raises ValueError as `forward` does."""
        new_keys, new_values = keys, values
        for adapter, rows in self._shares(keys):
            own_keys, own_values = adapter.keys_values(layer, keys[rows], values[rows])
            new_keys = new_keys.index_copy(0, rows, own_keys.to(keys.dtype))
            new_values = new_values.index_copy(0, rows, own_values.to(values.dtype))
        return new_keys, new_values

    def edit_embeddings(self, words: Tensor, mask: Tensor) -> Tensor:
        """As `SoftPrompt.edit_embeddings`. Raises ValueError as `forward` does."""
        edited = words
        for adapter, rows in self._shares(words):
            edited = edited.index_copy(0, rows, adapter.edit_embeddings(words[rows], mask[rows]).to(words.dtype))
        return edited

    def scale(self, layer: int, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """As `SoftPrompt.scale`. Raises ValueError as `forward` does."""
        shares = [(adapter.scale(layer, states[rows], mask[rows]), rows) for adapter, rows in self._shares(states)]
        order = torch.cat([rows for _, rows in shares]).argsort()
        return {part: torch.cat([own[part] for own, _ in shares])[order] for part in self.scales}

    def adjust_scores(self, scores: Tensor) -> Tensor:
        """Each row's scores (B, C), as its adapter adjusts them."""
        adjusted = scores
        for adapter, rows in self._shares(scores):
            adjusted = adjusted.index_copy(0, rows, adapter.adjust_scores(scores[rows]).to(scores.dtype))
        return adjusted

    def _shares(self, batch: Tensor | None = None) -> list[tuple[SoftPrompt, Tensor]]:
        """Every adapter that is asked for, and the indices of its rows, on the batch's device."""
        if self.rows is None:
            raise ValueError("which adapter serves which row? Call the model inside `RowMixture.serving`")
        if batch is not None and len(batch) != len(self.rows):
            raise ValueError(f"the batch has {len(batch)} rows, `serving` was told of {len(self.rows)}")
        device = batch.device if batch is not None else None
        shares = []
        for index, adapter in enumerate(self.adapters):
            assert isinstance(adapter, SoftPrompt)
            rows = (self.rows == index).nonzero().squeeze(1)
            if len(rows):
                shares.append((adapter, rows.to(device)))
        return shares
