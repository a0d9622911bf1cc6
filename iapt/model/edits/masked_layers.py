"""Layers in which no other token sees the soft columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from iapt.model.architecture import MaskArgument, attention_of, mask_argument
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit, Plan, Site, check_attention_everywhere, shared
from iapt.model.edits.rows import Rows


class Answer(Protocol):
    """The question that `MaskedLayers` asks its method.

    Attributes:
        masked_layers: the decoder layers in which no other token sees the soft columns; asked at the start of every
            pass over an instruction, so training may change it.
    """

    @property
    def masked_layers(self) -> frozenset[int]: ...


class MaskedLayers(Edit):
    """The soft columns are taken out of the attention mask in `method.masked_layers`."""

    def __init__(self, method: Answer) -> None:
        self.method = method

    def check(self, backbone: Backbone, name: str) -> None:
        check_attention_everywhere(backbone, name)

    def install(self, site: Site) -> None:
        for index, layer in enumerate(site.layers):
            attention = attention_of(layer)
            site.before(attention, partial(self._before_attention, index, mask_argument(attention)))

    def begin(self, plan: Plan) -> None:
        plan.hidden = plan.hidden | self.method.masked_layers
        plan.kept[self] = plan.hidden

    def _before_attention(
        self,
        index: int,
        argument: MaskArgument,
        plan: Plan,
        attention: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if plan.soft is None or index not in plan.hidden:
            return None
        given = argument.signature.bind(*args, **kwargs)
        hidden: Tensor = given.arguments[argument.states]
        cached = plan.cache.get_seq_length(index) if plan.cache is not None else 0
        given.arguments[argument.name] = _hide(
            given.arguments.get(argument.name), plan.soft, hidden, cached, attention, argument.true_hides
        )
        return given.args, given.kwargs

    def following(self, kept: frozenset[int]) -> frozenset[int] | None:
        """The layers, in which no later token sees the soft columns either."""
        return kept or None

    @classmethod
    def mix(cls, edits: Sequence[Edit | None], rows: Rows) -> MaskedLayers:
        layers = [edit.method.masked_layers if isinstance(edit, MaskedLayers) else frozenset() for edit in edits]
        return cls(_Shared(shared("masked_layers", layers)))


@dataclass(frozen=True)
class _Shared:
    masked_layers: frozenset[int]


def _hide(
    mask: Tensor | None, soft: Tensor, hidden: Tensor, cached: int, attention: nn.Module, true_hides: bool
) -> Tensor:
    """The attention mask with the soft columns hidden from every row but their own.

    Takes all forms that transformers hands to a layer: (B, 1, Q, K) bool or additive, (B, K) for flash attention,
    None where it leaves causality to the kernel.

    Args:
        soft: (B, s) int64, the soft columns among all K.
        hidden: (B, Q, d), the module's input.
        cached: K - Q.
        true_hides: a boolean mask is True at what is not seen.
    """
    rows = hidden.shape[1]
    columns = torch.arange(cached + rows, device=hidden.device)
    own = (columns[None, :, None] == soft[:, None]).any(-1)  # (B, K)
    config: Any = getattr(attention, "config", None)
    flash = "flash" in str(getattr(config, "_attn_implementation", ""))
    if mask is None:
        mask = torch.ones_like(own) if flash else (columns <= columns[cached:, None])[None, None] != true_hides
    if mask.dim() == 2:
        return mask.bool() & ~own
    # A row of nothing but hidden columns would make the softmax NaN, and NaN survives a weight of 0: the soft rows
    # go on seeing themselves.
    hide = (own[:, None, :] & ~own[:, cached:, None])[:, None]
    if mask.dtype != torch.bool:
        return mask.masked_fill(hide, torch.finfo(mask.dtype).min)
    return mask | hide if true_hides else mask & ~hide
