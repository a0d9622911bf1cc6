"""Low-rank offsets of token embeddings, one for each position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PositionOffsets(nn.Module):
    """Row i of c A B belongs to a text's i-th token; A (S, r), B (r, d), c = alpha / sqrt(r) (DePT, its released code).

    A starts as LoRA's does, Kaiming-uniform within 1 / sqrt(r), and B at zero: all offsets start at zero. Both are
    float32.
    """

    def __init__(self, length: int, width: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.factor = alpha / math.sqrt(rank)
        self.left = nn.Parameter(torch.empty(length, rank))
        self.right = nn.Parameter(torch.zeros(rank, width))
        nn.init.kaiming_uniform_(self.left, a=math.sqrt(5))

    def table(self) -> Tensor:
        """(S, d): every position's offset."""
        return self.factor * (self.left @ self.right)

    def forward(self, mask: Tensor) -> Tensor:
        """Mask (B, N) bool, False on padding, which may stand anywhere -> (B, N, d), zero on padding and on the tokens
        behind a row's first S."""
        place = mask.long().cumsum(1) - 1
        inside = mask & (place < len(self.left))
        return self.table()[place.clamp(0, len(self.left) - 1)] * inside.unsqueeze(-1)


def offset_parameters(length: int, width: int, rank: int) -> int:
    """r (S + d)."""
    return rank * (length + width)
