"""A saved adapter as a model again, without the task it was trained on: for texts that come from elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import OmegaConf
from torch import Tensor

from iapt import preflight
from iapt.config.check import literal
from iapt.config.errors import UserError
from iapt.config.schema import Config
from iapt.data.batch import Batch, Encoded, collate
from iapt.data.tokens import Ids
from iapt.methods.registry import spec_of
from iapt.methods.settings import load_config
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import build_backbone
from iapt.model.checkpoint import check_backbone, load_adapter
from iapt.model.method import SoftPrompt
from iapt.model.stored import need
from iapt.runs.hardware import check_hardware
from iapt.runs.own import is_local, is_own, paths_of
from iapt.runs.sweep import flatten


@dataclass
class Saved:
    """What a run or adapter folder holds.

    Attributes:
        folder: where it was read.
        key: the setting that named it, for messages.
        config: the run's configuration with the overrides laid over it, for one process.
        tensors: the adapter, by name.
        meta: the content of `adapter.json`.
    """

    folder: Path
    config: Config
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    key: str = "checkpoint"

    def identity(self) -> dict[str, Any]:
        """The fields of a `Summary` that say which model it is."""
        config = self.config
        return {
            "method": config.method.name,
            "backbone": config.backbone.name,
            "seed": config.seed,
            "trainable_params": self.meta["trainable_params"],
            "checkpoint": str(self.folder),
        }


def read_saved(folder: Path, overrides: dict[str, Any], key: str = "checkpoint") -> Saved:
    """Read a checkpoint; nothing is built yet.

    Args:
        folder: a run or adapter folder; it is only read.
        overrides: nested settings laid over the run's own, as `iapt.runs.experiment.evaluate` takes them.
        key: the setting that names it, for messages.

    Raises:
        UserError: an unreadable checkpoint, bad overrides.
    """
    tensors, meta = load_adapter(folder, key)
    if "config" not in meta:
        raise UserError(
            f"{key} = {folder}: was saved from Python, so its task and backbone are not known; iapt.load reads it"
        )
    need(meta, f"{key} = {folder}", "method.name", "backbone", "trainable_params")
    # A named task or backbone replaces the run's own; single settings are laid over it.
    replaced = {key for key, value in overrides.items() if isinstance(value, dict) and "name" in value}
    kept = {key: value for key, value in literal(meta["config"]).items() if key not in replaced}
    if isinstance(kept.get("task"), dict):  # runs before there was this setting took every number for an index
        kept["task"] = {"integer_labels": "indices", **kept["task"]}
    config: Config = load_config(OmegaConf.merge(kept, overrides))  # type: ignore[arg-type]
    _refuse_strange_paths(meta, config, flatten(overrides), f"{key} = {folder}")
    # However many processes trained it, one scores it.
    hardware = dataclasses.replace(config.hardware, num_processes=1, strategy="ddp")
    return Saved(folder, dataclasses.replace(config, hardware=hardware), tensors, meta, key)


def _refuse_strange_paths(meta: dict[str, Any], config: Config, given: dict[str, Any], where: str) -> None:
    followed = {k: path for k, path in paths_of(config).items() if given.get(k) != path and is_local(k, path)}
    sealed = meta.get("paths")
    if not followed or (
        isinstance(sealed, dict) and followed.items() <= sealed.items() and is_own(sealed, meta.get("seal"))
    ):
        return
    named = ", ".join(f"{key} = {path}" for key, path in followed.items())
    again = " ".join(f"{key}={path if Path(path).exists() else '...'}" for key, path in followed.items())
    raise UserError(
        f"{where}: names {named}, but no run of this user wrote it, so its paths are not followed; give them yourself: "
        f"{again}"
    )


def refuse_bound_to_task(saved: Saved) -> None:
    """Raises UserError for a method that rewrites its task's text, or scores its task's labels: it says nothing about
    other texts."""
    method = saved.config.method
    if spec_of(method).rewrite is not None or method.bound_to_task:
        raise UserError(
            f"checkpoint = {saved.folder}: method {method.name} is made for the text or labels of its task and has "
            "nothing to say about any other; give the checkpoint of another method, zero_shot for the bare backbone"
        )


def put_back(model: AdaptedModel, tensors: dict[str, Tensor], where: str) -> None:
    """Load a saved state into a fresh model.

    Raises:
        UserError: tensors that do not fit, named after `where` they come from; the model is detached then.
    """
    try:
        model.load_adapter_state(tensors)
    except ValueError as error:
        model.detach()
        raise UserError(f"{where}: {error}") from None


def build_model(saved: Saved) -> tuple[AdaptedModel, Accelerator]:
    """The adapted model on its device, in eval mode; its preflight is over.

    Raises:
        UserError: hardware that is not there, a backbone that does not load or that the adapter was not trained on,
            what the preflight finds to be wrong.
    """
    config = saved.config
    check_hardware(config)
    accelerator = Accelerator(cpu=config.hardware.device == "cpu")
    set_seed(config.seed)
    hardware = config.hardware
    backbone = build_backbone(
        config.backbone, precision=hardware.precision, attention=hardware.attention, device=accelerator.device
    )
    check_backbone(backbone.identity(), saved.meta["backbone"], saved.folder, saved.key)
    method = spec_of(config.method).build(config.method, backbone)
    model = AdaptedModel(backbone, method, precision=hardware.precision)
    put_back(model, saved.tensors, f"{saved.key} = {saved.folder}")
    preflight.run(config, model, gradients=False)
    return model, accelerator


def room(model: AdaptedModel) -> int | None:
    """Positions of the context that soft tokens leave for text, None for no limit."""
    context = model.backbone.context
    taken = model.method.num_soft_tokens if isinstance(model.method, SoftPrompt) else 0
    return None if context is None else context - taken


def batch_of(model: AdaptedModel, instructions: Sequence[Ids], responses: Sequence[Ids] | None = None) -> Batch:
    """B >= 1 rows of token ids as a batch on the model's device; without `responses` it is one to generate from."""
    answers = [ids[-1:] for ids in instructions] if responses is None else responses
    pairs = enumerate(zip(instructions, answers, strict=True))
    rows = [Encoded(index, instruction, response, ()) for index, (instruction, response) in pairs]
    return collate(rows, model.backbone.pad_id).to(model.lm.device)
