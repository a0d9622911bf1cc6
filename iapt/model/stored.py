"""What an adapter folder must hold before anything of it is used: it may come from a stranger.

Its JSON is data. Nothing of it is run, interpolated or followed because of its shape; what does not look like an
adapter is refused in one line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from iapt.config.errors import UserError

MAX_BYTES = 16 * 2**20  # of adapter.json; a run's has some kilobytes
_TYPES: dict[str, type] = {
    "schema_version": int, "method": dict, "backbone": dict, "config": dict, "trainable_params": int,
    "template_hash": str,
}  # fmt: skip
_TEXTS = (("method", "name"), ("method", "kind"), ("backbone", "name"), ("backbone", "fingerprint"))


def read_meta(path: Path, where: str) -> dict[str, Any]:
    """The content of an `adapter.json`.

    Args:
        path: the file.
        where: the setting and the folder, for messages.

    Raises:
        UserError: a file that cannot be read, is too large, is no JSON object, or holds another type than a run
            writes.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{where}: {path.name} has {size:,} bytes; allowed are {MAX_BYTES:,}")
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read: {path.name}: {error or type(error).__name__}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{where}: {path.name} holds {type(meta).__name__}, expected an object")
    for key, kind in _TYPES.items():
        if key in meta and (not isinstance(meta[key], kind) or isinstance(meta[key], bool)):
            raise UserError(f"{where}: {path.name}: {key} = {meta[key]!r:.80}: expected {kind.__name__}")
    for group, key in _TEXTS:
        if not isinstance(value := meta.get(group, {}).get(key), str | None):
            raise UserError(f"{where}: {path.name}: {group}.{key} = {value!r:.80}: expected str")
    return meta


def need(meta: dict[str, Any], where: str, *keys: str) -> None:
    """Raises UserError if `read_meta`'s content lacks one of `keys`; `method.name` is the name in the method's."""
    missing = []
    for key in keys:
        group, _, name = key.partition(".")
        if group not in meta or (name and meta[group].get(name) is None):
            missing.append(key)
    if missing:
        raise UserError(f"{where}: adapter.json does not say {', '.join(missing)}")


def check_tensors(tensors: dict[str, Tensor], where: str) -> None:
    """Raises UserError for a tensor with NaN or infinite values, from which only nonsense would follow."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise UserError(f"{where}: tensor {name!r} has {count:,} of {tensor.numel():,} values that are NaN or inf")
