"""A KV cache of our own, through the one method that every attention module of transformers calls: `Cache.update`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

# (layer, keys (B, H_kv, Q, d_h), values (B, H_kv, Q, d_h)) -> both, as they shall be kept.
CacheEdit = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


class PassCache(DynamicCache):  # type: ignore[misc]
    """A view of a cache for one pass: it may edit what the pass writes, and may leave the cache as it is.

    Args:
        behind: what earlier passes have written; None: nothing.
        edit: is asked about each layer's new keys and values.
        keep: whether `behind` keeps them. Where it does not, a pass may be run again (in the backward pass of
            activation checkpointing) or another one run from the same place, and nothing has to be taken back.

    Attributes:
        asked: the layers whose keys and values came by in this pass.
    """

    def __init__(self, behind: DynamicCache | None, edit: CacheEdit | None = None, keep: bool = False) -> None:
        super().__init__()
        if behind is not None:
            self.layers = behind.layers  # the list itself: a layer that is added is added to both
        self._edit, self._keep = edit, keep
        self.asked: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values as transformers' `Cache.update` does."""
        self.asked.add(layer_idx)
        if self._edit is not None:
            key_states, value_states = self._edit(layer_idx, key_states, value_states)
        if self._keep:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= len(self.layers) or not self.layers[layer_idx].is_initialized:
            return key_states, value_states
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)
