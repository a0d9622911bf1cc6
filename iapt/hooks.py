"""Forward pre-hooks on a backbone's decoder layers: how soft tokens get in, and instruction states out.

A plan says what the hooks do during one pass; without one they do nothing, so other users of the backbone never
notice them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from iapt.methods import SoftPrompt
from iapt.scaling import part_of


@dataclass
class Plan:
    """What the hooks do during one pass over the decoder.

    Attributes:
        mask: (B, N) bool, the instruction's.
        slots: (B, s) int64, the columns of this pass that soft tokens are written into; None: none are.
        columns: (B, N) int64, where this pass holds the instruction's states; None if `states` gives them.
        states: the instruction's states, one (B, N, d) a layer.
        record: every layer's input is appended here; nothing is written then.
        soft: (B, s) int64, where the soft tokens stand among all columns, the cached ones included.
        scales: layer and part of it -> (B, width), what its output is multiplied by; filled by the pass over the
            instruction, and still there for what follows it.
        first: (B, 1, d), stands for the first token that is embedded after the prefix.
        hidden: the layers in which no other token sees the soft columns.
    """

    mask: Tensor
    slots: Tensor | None = None
    columns: Tensor | None = None
    states: Sequence[Tensor] = ()
    record: list[Tensor] | None = None
    soft: Tensor | None = None
    scales: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    first: Tensor | None = None
    hidden: frozenset[int] = frozenset()

    def repeat(self, copies: int) -> None:
        """Every row `copies` times, for beams and samples; for plans of a continuation."""
        self.soft, self.first = (t if t is None else t.repeat_interleave(copies, 0) for t in (self.soft, self.first))
        self.scales = {place: scale.repeat_interleave(copies, 0) for place, scale in self.scales.items()}


class LayerHooks:
    """Hooks on the decoder layers, and on parts of them and the embedding table for the methods that reach there.

    Args:
        layers: the decoder layers, in order.
        embeddings: the table of token embeddings.
        method: whose soft tokens are written; any other method, or None, has none.

    Attributes:
        plan: what to do in the passes to come.
        first: (B, 1, d), what the embedding table answers next time, and only then.
    """

    def __init__(self, layers: Iterable[nn.Module], embeddings: nn.Module, method: nn.Module | None) -> None:
        self.plan: Plan | None = None
        self.first: Tensor | None = None
        self._method = method
        self._handles = []
        for index, layer in enumerate(layers):
            hook = partial(self._before_layer, index)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if isinstance(method, SoftPrompt) and (method.edits_cache or method.hides):
                # Not on the layer: what it is handed passes through activation checkpointing, which drops caches.
                inner = partial(self._before_attention, index)
                self._handles.append(_attention(layer).register_forward_pre_hook(inner, with_kwargs=True))
            for part in method.scales if isinstance(method, SoftPrompt) else ():
                module, columns, _ = part_of(layer, part)
                after = partial(self._after_part, (index, part), columns)
                self._handles.append(module.register_forward_hook(after))

        if isinstance(method, SoftPrompt) and method.edits_embeddings:
            self._handles.append(embeddings.register_forward_hook(self._after_embeddings))

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan = self.plan
        if plan is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if plan.record is not None:
            plan.record.append(hidden)
            return None
        if plan.slots is None:
            return None
        assert isinstance(self._method, SoftPrompt)
        states = plan.states[index] if plan.columns is None else _take(hidden, plan.columns)
        # Where nothing sees the soft tokens, there is nothing to ask for.
        soft = None if index in plan.hidden else self._method(index, states, plan.mask, _take(hidden, plan.slots))
        if self._method.scales:
            scales = self._method.scale(index, states, plan.mask)
            plan.scales.update({(index, part): scale for part, scale in scales.items()})
        if soft is None:
            return None
        hidden = _put(hidden, plan.slots, soft)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _after_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        first, self.first = self.first, None
        return first

    def _after_part(
        self, place: tuple[int, str], columns: slice | None, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        if self.plan is None or (scale := self.plan.scales.get(place)) is None:
            return None
        # OPT's feed-forward sees the rows of a batch as one long row, (B Q, width).
        rows = output.view(len(scale), -1, output.shape[-1])
        scale = scale[:, None].to(output.dtype)
        if columns is None:
            return (rows * scale).view_as(output)
        parts = [rows[..., : columns.start], rows[..., columns] * scale, rows[..., columns.stop :]]
        return torch.cat(parts, -1).view_as(output)

    def _before_attention(
        self, index: int, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan, method = self.plan, self._method
        if plan is None or plan.record is not None:
            return None
        assert isinstance(method, SoftPrompt)
        cache = kwargs.get("past_key_values")
        changed: dict[str, Any] = {}
        if method.edits_cache and plan.slots is not None and index not in plan.hidden:
            changed["past_key_values"] = _SlotCache(cache, partial(method.keys_values, index), plan.slots)
        if index in plan.hidden and plan.soft is not None:
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            cached = cache.get_seq_length(index) if cache is not None else 0
            changed["attention_mask"] = _hide(kwargs.get("attention_mask"), plan, hidden, cached, attention)
        return args, {**kwargs, **changed}


class _SlotCache:
    """Stands in for a layer's cache during one pass: lets a method edit the soft columns' keys and values.

    Attention modules know a cache by its `update` alone; with None behind it, nothing is kept.
    """

    def __init__(
        self, cache: Cache | None, edit: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], slots: Tensor
    ) -> None:
        self._cache, self._edit, self._slots = cache, edit, slots

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers' `Cache.update`."""
        slots = self._slots[:, None].expand(-1, keys.shape[1], -1)
        edited = self._edit(_take(keys, slots), _take(values, slots))
        keys, values = _put(keys, slots, edited[0]), _put(values, slots, edited[1])
        return (keys, values) if self._cache is None else self._cache.update(keys, values, layer, *args, **kwargs)


def _attention(layer: nn.Module) -> nn.Module:
    """A decoder layer's self-attention, by the names that transformers uses."""
    for name in ("self_attn", "attn", "attention", "self_attention"):
        if isinstance(module := getattr(layer, name, None), nn.Module):
            return module
    raise ValueError(f"found no self-attention in {type(layer).__name__}")


def _take(whole: Tensor, columns: Tensor) -> Tensor:
    """whole (..., K, d), columns (..., n) -> (..., n, d)."""
    return whole.gather(-2, columns[..., None].expand(*columns.shape, whole.shape[-1]))


def _put(whole: Tensor, columns: Tensor, part: Tensor) -> Tensor:
    """whole (..., K, d) with part (..., n, d) at columns (..., n)."""
    return whole.scatter(-2, columns[..., None].expand_as(part), part.to(whole.dtype))


def _hide(mask: Tensor | None, plan: Plan, hidden: Tensor, cached: int, attention: nn.Module) -> Tensor:
    """The attention mask with the soft columns hidden from every row but their own.

    Takes all forms that transformers hands to a layer: (B, 1, Q, K) bool or additive, (B, K) for flash attention,
    None where it leaves causality to the kernel.
    """
    assert plan.soft is not None
    rows = hidden.shape[1]
    columns = torch.arange(cached + rows, device=hidden.device)
    soft = (columns[None, :, None] == plan.soft[:, None]).any(-1)  # (B, K)
    config: Any = getattr(attention, "config", None)
    flash = "flash" in str(getattr(config, "_attn_implementation", ""))
    if mask is None:
        mask = torch.ones_like(soft) if flash else (columns <= columns[cached:, None])[None, None]
    if mask.dim() == 2:
        return mask.bool() & ~soft
    # A row of nothing but hidden columns would make the softmax NaN, and NaN survives a weight of 0: the soft rows
    # go on seeing themselves.
    hide = (soft[:, None, :] & ~soft[:, cached:, None])[:, None]
    return mask & ~hide if mask.dtype == torch.bool else mask.masked_fill(hide, torch.finfo(mask.dtype).min)
