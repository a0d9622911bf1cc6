"""Keys and values of the soft columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from iapt.model.architecture import check_keys_and_values
from iapt.model.backbone import Backbone
from iapt.model.cache import CacheEdit
from iapt.model.edits.base import Edit, Plan, Site, check_attention_everywhere, put, take
from iapt.model.edits.rows import Rows, put_rows


class Answer(Protocol):
    """The questions that `KeysValues` asks its method."""

    def keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that layer `layer` keeps of the soft tokens.

        Args:
            layer: 0-based index of the decoder layer, never one in which the soft columns are hidden.
            keys: (B, H_kv, s, d_h) of the soft columns, rotated where the model rotates.
            values: (B, H_kv, s, d_h).

        Returns:
            Both, replaced or changed, shapes and dtypes kept.
        """


class KeysValues(Edit):
    """Every layer keeps what `method.keys_values` makes of the soft tokens' keys and values."""

    def __init__(self, method: Answer) -> None:
        self.method = method

    def check(self, backbone: Backbone, name: str) -> None:
        check_attention_everywhere(backbone, name)

    def install(self, site: Site) -> None:
        for layer in site.layers:
            check_keys_and_values(layer)

    def on_cache(self, plan: Plan) -> CacheEdit | None:
        slots = plan.slots
        if slots is None:
            return None

        def edited(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            if layer in plan.hidden:
                return keys, values
            soft = slots[:, None].expand(-1, keys.shape[1], -1)
            own = self.method.keys_values(layer, take(keys, soft), take(values, soft))
            return put(keys, soft, own[0]), put(values, soft, own[1])

        return edited

    @classmethod
    def mix(cls, edits: Sequence[Edit | None], rows: Rows) -> KeysValues:
        return cls(_Mixed([edit.method if isinstance(edit, KeysValues) else None for edit in edits], rows))


@dataclass
class _Mixed:
    methods: Sequence[Answer | None]
    rows: Rows

    def keys_values(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        shares = self.rows.shares(self.methods, keys)
        own = [(method.keys_values(layer, keys[of], values[of]), of) for method, of in shares]
        return put_rows(keys, ((k, of) for (k, _), of in own)), put_rows(values, ((v, of) for (_, v), of in own))
