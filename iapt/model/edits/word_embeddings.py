"""The embeddings of the instruction's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from iapt.model.edits.base import Edit, Plan
from iapt.model.edits.rows import Rows, put_rows


class Answer(Protocol):
    """The question that `WordEmbeddings` asks its method."""

    def edit_embeddings(self, words: Tensor, mask: Tensor) -> Tensor:
        """The instruction's token embeddings as the model shall see them.

        Args:
            words: (B, N, d) the frozen table's rows, before the model scales them or adds positions.
            mask: (B, N) bool, False on padding, which is on the left.

        Returns:
            (B, N, d) in any float dtype. What it says on padding reaches nothing.
        """


class WordEmbeddings(Edit):
    """The instruction enters as `method.edit_embeddings` has edited it; only with `before_instruction`."""

    def __init__(self, method: Answer) -> None:
        self.method = method

    def embed(self, plan: Plan, words: Tensor) -> Tensor:
        words = self.method.edit_embeddings(words, plan.mask).to(words.dtype)
        plan.kept[self] = words[:, -1:]
        return words

    def following(self, kept: Tensor) -> Tensor:
        """(B, 1, d): the instruction's last token, which every continuation runs again."""
        return kept

    def enter(self, kept: Tensor, embeds: Tensor) -> Tensor:
        return torch.cat([kept, embeds[:, 1:]], 1)

    def repeat(self, kept: Tensor, copies: int) -> Tensor:
        return kept.repeat_interleave(copies, 0)

    @classmethod
    def mix(cls, edits: Sequence[Edit | None], rows: Rows) -> WordEmbeddings:
        return cls(_Mixed([edit.method if isinstance(edit, WordEmbeddings) else None for edit in edits], rows))


@dataclass
class _Mixed:
    methods: Sequence[Answer | None]
    rows: Rows

    def edit_embeddings(self, words: Tensor, mask: Tensor) -> Tensor:
        shares = self.rows.shares(self.methods, words)
        return put_rows(words, ((method.edit_embeddings(words[of], mask[of]), of) for method, of in shares))
