"""Training that starts from what another run left: an adapter (`method.init_from`) or a teacher (`method.source`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from iapt.config.errors import UserError
from iapt.config.fields import Role
from iapt.config.method import MethodConfig
from iapt.config.roles import role_of
from iapt.config.schema import to_dict
from iapt.model.adapted import AdaptedModel
from iapt.model.checkpoint import check_backbone, load_adapter
from iapt.model.method import SoftPrompt
from iapt.model.stored import need
from iapt.runs.restore import build_model, read_saved

KEY = "method.init_from"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a start came from; what its folder does not tell is None.

    Attributes:
        folder, method, task, seed: of the adapter.
        differs: settings in which its method is not this one, in words.
    """

    folder: str
    method: str
    task: str | None
    seed: int | None
    differs: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What `summary.json` says about it."""
        return {"folder": self.folder, "task": self.task, "seed": self.seed, "method": self.method}

    def __str__(self) -> str:
        trained = f"trained on {self.task}, seed {self.seed}" if self.task else "saved from Python"
        other = f"; other settings than here: {', '.join(self.differs)}" if self.differs else ""
        return f"starts from the {self.method} adapter in {self.folder}, {trained}{other}"


def start_from(model: AdaptedModel, config: MethodConfig, backbone: dict[str, Any]) -> Origin | None:
    """Put the tensors of the adapter that `config.init_from` names into a fresh model; None if it names none.

    Where the config names a `source`, that run's model becomes the method's teacher.

    Args:
        model: built from `config`; detached if this fails.
        config: of its method.
        backbone: the identity of the bare backbone.

    Raises:
        UserError: a folder without an adapter, an adapter of another method, backbone or size.
    """
    named, source = (config.adapters().get(key) for key in ("init_from", "source"))
    try:
        if source is not None:
            assert isinstance(model.method, SoftPrompt)
            model.method.learn_from(_teacher(source, model.lm.device), model.backbone)
        return _start_from(model, config, backbone, Path(named).expanduser()) if named is not None else None
    except UserError:
        model.detach()
        raise


def _teacher(folder: str, device: torch.device) -> AdaptedModel:
    """The model that a run left; leaves torch's random numbers as they were."""
    saved = read_saved(Path(folder).expanduser(), {"hardware": {"device": device.type}}, "method.source")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        source, _ = build_model(saved)
    if not isinstance(source.method, SoftPrompt):
        raise UserError(
            f"method.source = {folder}: holds an adapter of method {saved.config.method.name}, not a soft prompt's"
        )
    return source


def _start_from(model: AdaptedModel, config: MethodConfig, backbone: dict[str, Any], folder: Path) -> Origin:
    tensors, meta = load_adapter(folder, KEY)
    need(meta, f"{KEY} = {folder}", "method.name", "backbone")
    saved, method = meta["method"], model.method
    assert isinstance(method, SoftPrompt)
    kind, wanted = saved.get("kind") or saved["name"], config.kind or config.name
    if kind not in (wanted, *method.starts_from):
        allowed = ", ".join((wanted, *method.starts_from))
        raise UserError(f"{KEY} = {folder}: holds an adapter of method {saved['name']}; allowed here: {allowed}")
    check_backbone(backbone, meta["backbone"], folder, KEY)
    differs = tuple(
        f"{key} = {saved[key]!r} (here {value!r})"
        for key, value in to_dict(config).items()
        if key != "init_from" and Role.ROW in role_of(f"method.{key}") and key in saved and saved[key] != value
    )
    try:
        model.load_adapter_state(method.adopt(tensors))
    except ValueError as error:
        why = f"its settings lead to other tensors: {', '.join(differs)}" if differs else str(error)
        raise UserError(f"{KEY} = {folder}: {why}") from None
    run = meta.get("config", {})
    return Origin(str(folder), saved["name"], (run.get("task") or {}).get("name"), run.get("seed"), differs)
