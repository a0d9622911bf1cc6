"""Pooling over the instruction's tokens, padding left out."""

from __future__ import annotations

from torch import Tensor


def self_attention_pool(states: Tensor, queries: Tensor, mask: Tensor) -> Tensor:
    """Self-attention pooling: A = softmax over positions of Z W_sa, Q = A^T Z (label S).

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
