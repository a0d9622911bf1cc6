"""Pooling over the instruction's tokens, padding left out."""

from __future__ import annotations

import torch
from torch import Tensor


def self_attention_pool(states: Tensor, queries: Tensor, mask: Tensor) -> Tensor:
    """Self-attention pooling: A = softmax over positions of Z W_sa, Q = A^T Z (label S, docs/methods.md).

    Args:
        states: Z, (B, N, r).
        queries: W_sa, (r, s): one learned query column a soft token.
        mask: (B, N) bool, False on padding; a row needs one True at least.

    Returns:
        Q, (B, s, r) in the states' dtype. The softmax runs in float32 or better.
    """
    logits = (states @ queries).masked_fill(~mask.unsqueeze(-1), float("-inf"))
    weights = (logits if logits.element_size() > 4 else logits.float()).softmax(dim=1).to(states.dtype)
    return weights.transpose(1, 2) @ states


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """(B, N, d), (B, N) bool -> (B, d), the mean over real tokens."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def segment_pool(states: Tensor, mask: Tensor, bins: int, reduce: str) -> Tensor:
    """Adaptive pooling of each row's real tokens into contiguous segments, in order.

    As torch's `adaptive_avg_pool1d` and `adaptive_max_pool1d` would cut the row's n real tokens alone: segment i
    covers floor(i n / bins) up to, not including, ceil((i + 1) n / bins). Rows shorter than `bins` repeat tokens.

    Args:
        states: (B, N, d).
        mask: (B, N) bool, False on padding, which may stand anywhere; a row needs one True at least.
        bins: the number of segments.
        reduce: `mean` or `max`.

    Returns:
        (B, bins, d) in the states' dtype.

    Raises:
        ValueError: for any other `reduce`.
    """
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce = {reduce!r}: allowed are mean, max")
    length = mask.sum(1)[:, None, None]
    place = (mask.long().cumsum(1) - 1).unsqueeze(1)  # (B, 1, N): which real token of its row a column is
    segment = torch.arange(bins, device=mask.device)[:, None]
    start, end = segment * length // bins, -((segment + 1) * length // -bins)  # (B, bins, 1)
    inside = mask.unsqueeze(1) & (place >= start) & (place < end)  # (B, bins, N)
    if reduce == "mean":
        weights = inside.to(states.dtype)
        return weights @ states / weights.sum(-1, keepdim=True)
    # One segment after the other: all at once would hold (B, bins, N, d).
    parts = [states.masked_fill(~part.unsqueeze(-1), float("-inf")).amax(1) for part in inside.unbind(1)]
    return torch.stack(parts, 1)


def last_tokens(states: Tensor, mask: Tensor, count: int) -> Tensor:
    """The last `count` real tokens of each row, in order.

    Args:
        states: (B, N, d).
        mask: (B, N) bool, False on padding, which may stand anywhere; a row needs one True at least.
        count: how many; a shorter row repeats its first real token in front.

    Returns:
        (B, count, d).
    """
    length = mask.sum(1, keepdim=True)
    wanted = (length - count + torch.arange(count, device=mask.device)).clamp(min=0)  # (B, count)
    # A stable sort brings each row's real columns to the front in order.
    columns = (~mask).to(torch.uint8).argsort(dim=1, stable=True).gather(1, wanted)
    return states.gather(1, columns.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
