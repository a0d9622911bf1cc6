"""A saved adapter, whoever saved it: its tensors, and what says which method and backbone they belong to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from iapt.config.errors import UserError
from iapt.folder.files import write_json
from iapt.folder.names import ADAPTER, META
from iapt.model.stored import check_tensors, read_meta

SCHEMA_VERSION = 1


def save_adapter(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write the adapter into `folder`.

    Args:
        folder: exists.
        tensors: name -> float32 tensor.
        meta: JSON-able; the schema version is added.
    """
    temporary = folder / (ADAPTER + ".part")
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / ADAPTER)
    write_json(folder / META, {"schema_version": SCHEMA_VERSION, **meta})


def load_adapter(folder: Path, key: str = "checkpoint") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read an adapter folder: its tensors and what `save_adapter` was given as meta.

    Args:
        folder: a run or adapter folder.
        key: the setting that names it, for messages.

    Raises:
        UserError: a missing folder or file, one that cannot be read, a newer schema, tensors that are not finite.
    """
    for name in (META, ADAPTER):
        if not (folder / name).is_file():
            here = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
            raise UserError(
                f"{key} = {folder}: expected a run or adapter folder with {META} and {ADAPTER}; "
                f"{name} is missing (found: {here or 'nothing'})"
            )
    meta = read_meta(folder / META, f"{key} = {folder}")
    version = meta.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{key} = {folder}: schema version {version}, this release reads {SCHEMA_VERSION}")
    try:
        tensors = load_file(folder / ADAPTER)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{key} = {folder}: cannot be read: {error}") from error
    check_tensors(tensors, f"{key} = {folder}")
    return tensors, meta


def check_backbone(found: dict[str, Any], expected: dict[str, Any], folder: Path, key: str = "checkpoint") -> None:
    """Refuse a backbone that the adapter in `folder`, which the setting `key` names, was not trained on.

    Raises:
        UserError: naming what differs. Names may differ, and a fingerprint that could not be taken is not held
            against a backbone.
    """
    differs = [
        f"{key} is {found.get(key)}, the adapter's was {value}"
        for key, value in expected.items()
        if key != "name" and value is not None and found.get(key) is not None and found[key] != value
    ]
    if differs:
        raise UserError(
            f"{key} = {folder}: trained on backbone '{expected.get('name')}', which this one "
            f"('{found.get('name')}') is not: {'; '.join(differs)}"
        )
