"""One run, start to finish: build, score the bare backbone, train, evaluate, write the run folder (`iapt.folder`).

`run` and `evaluate` are the same code on one process and on many; every rank calls them with the same arguments.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from iapt import preflight
from iapt.config.errors import TrainingError, UserError
from iapt.config.schema import Config, to_dict
from iapt.data.batch import Encoded
from iapt.data.task import Task, build_task
from iapt.evaluation.evaluate import Evaluation
from iapt.evaluation.evaluate import evaluate as evaluate_split
from iapt.folder.files import write_rows
from iapt.folder.names import PREDICTIONS
from iapt.folder.summary import OK, Summary, refuse_finished, write_summary
from iapt.methods.budget import Fitted, fit_to_budget, parse_budget
from iapt.methods.registry import spec_of
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import Backbone, build_backbone, shard_layers
from iapt.model.checkpoint import check_backbone, save_adapter
from iapt.model.method import SoftPrompt
from iapt.runs import stages
from iapt.runs.diagnosis import diagnose
from iapt.runs.hardware import check_hardware
from iapt.runs.own import paths_of, seal
from iapt.runs.prepare import encode, present
from iapt.runs.provenance import circumstances
from iapt.runs.restore import put_back, read_saved
from iapt.runs.transfer import Origin, start_from
from iapt.training.tracking import Tracker

SPLITS = ("train", "dev", "test")


@dataclass
class Parts:
    """Everything a configuration builds.

    Attributes:
        config: the configuration, its method at the size that the budget led to.
        fitted: what the budget came to, None without one.
        task: as the method presents it; `bare` is the task itself, the same object for most methods.
        origin: the adapter that training starts from, None for a fresh start.
        backbone_parameters, backbone_identity: taken before the method or sharding changes the backbone's modules.
    """

    config: Config
    fitted: Fitted | None
    accelerator: Accelerator
    task: Task
    bare: Task
    backbone: Backbone
    backbone_parameters: int
    backbone_identity: dict[str, Any]
    model: AdaptedModel
    origin: Origin | None
    items: dict[str, list[Encoded]]
    notes: list[str]


def run(config: Config, folder: Path) -> Summary:
    """Train and evaluate one configuration.

    Args:
        config: checked by `load_config`.
        folder: the run folder; made if missing.

    Raises:
        UserError: bad input, a folder that holds a finished run among it.
        TrainingError: training started and failed.
    """
    refuse_finished(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _run(config, folder)
    except torch.OutOfMemoryError as error:
        remedy = "a larger hardware.gradient_accumulation or hardware.activation_checkpointing=true needs less"
        raise TrainingError(f"out of memory ({remedy}): {error}") from error


def evaluate(checkpoint: Path, folder: Path, overrides: dict[str, Any], split: str = "test") -> Summary:
    """Score a saved adapter.

    Args:
        checkpoint: a run or adapter folder; it is only read.
        folder: where `summary.json` and `predictions.jsonl` go; must not hold a finished run.
        overrides: nested settings laid over the run's own, for example {"data_dir": ...} or {"task": {...}}.
        split: train, dev or test.

    Raises:
        UserError: an unreadable checkpoint, a backbone it was not trained on, bad overrides.
    """
    if split not in SPLITS:
        raise UserError(f"split = {split!r}: allowed are {', '.join(SPLITS)}")
    refuse_finished(folder)
    saved = read_saved(checkpoint, overrides)
    config, meta = saved.config, saved.meta
    check_hardware(config)
    parts = build(config)
    check_backbone(parts.backbone_identity, meta["backbone"], checkpoint)
    put_back(parts.model, saved.tensors, f"checkpoint = {checkpoint}")
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(folder, parts.accelerator, folder.name)
    for note in parts.notes:
        tracker.say(note)
    same_task = config.task.name == (meta["config"].get("task") or {}).get("name")
    if same_task and parts.task.template_hash != meta.get("template_hash"):
        tracker.say("the template is not the one this adapter was trained with")
    tracker.say(preflight.run(config, parts.model, gradients=False))
    start = time.perf_counter()
    result = evaluate_split(
        parts.model, config.task, parts.task.splits[split], parts.items[split],
        config.trainer.eval_batch_size, parts.accelerator,
    )  # fmt: skip
    summary = Summary(
        **_identity(config, parts),
        checkpoint=str(checkpoint),
        split=split,
        metrics={split: result.values},
        preflight=parts.model.preflight,
        status=OK,
        eval_seconds=round(time.perf_counter() - start, 3),
        **circumstances(parts.accelerator),
    )
    if split != "train":
        setattr(summary, split, result.values[config.task.metrics[0]])
    if parts.accelerator.is_main_process:
        write_rows(folder / PREDICTIONS, result.predictions)
        write_summary(folder, summary)
    parts.model.detach()
    return summary


def build(config: Config, *, to_train: bool = False) -> Parts:
    """Task, backbone, method and model of a configuration, on this process's device.

    Args:
        config: checked by `load_config`.
        to_train: the model is at its start, the one of `method.init_from` if that names an adapter.
    """
    wandb = ["wandb"] if config.tracking.name == "wandb" else None
    accelerator = Accelerator(cpu=config.hardware.device == "cpu", log_with=wandb)
    set_seed(config.seed)
    bare = build_task(config.task, config.data_dir, config.protocol)
    hardware = config.hardware
    backbone = build_backbone(
        config.backbone, precision=hardware.precision, attention=hardware.attention, device=accelerator.device
    )
    identity = backbone.identity()
    # Seeded again: how many numbers building a random backbone draws must not move the adapter's start.
    set_seed(config.seed)
    parameters, fitted = sum(p.numel() for p in backbone.lm.parameters()), None
    if config.budget is not None:
        asked = parse_budget(config.budget, parameters)
        sized, fitted = fit_to_budget(config.method, backbone, asked)
        config = dataclasses.replace(config, method=sized, budget=None)
    method = spec_of(config.method).build(config.method, backbone)
    model = AdaptedModel(
        backbone,
        method,
        precision=hardware.precision,
        activation_checkpointing=hardware.activation_checkpointing,
    )
    origin = start_from(model, config.method, identity) if to_train else None
    if hardware.strategy == "fsdp":
        shard_layers(backbone, model.trainable().values())
    soft_tokens = method.num_soft_tokens if isinstance(method, SoftPrompt) else 0
    task = present(config, bare, backbone, soft_tokens)
    items, notes = encode(config, task, backbone, soft_tokens)
    if accelerator.num_processes > 1:  # from here on random numbers are dropout's, each rank's its own
        set_seed(config.seed, device_specific=True)
    if fitted:
        notes.append(str(fitted))
    if origin:
        notes.append(str(origin))
    return Parts(config, fitted, accelerator, task, bare, backbone, parameters, identity, model, origin, items, notes)


def _run(config: Config, folder: Path) -> Summary:
    parts = build(config, to_train=True)
    config = parts.config
    accelerator, task, model = parts.accelerator, parts.task, parts.model
    tracker = Tracker(folder, accelerator, "/".join(folder.parts[-3:]))
    tracker.start_wandb(config.tracking, to_dict(config))
    for note in parts.notes:
        tracker.say(note)
    identity = _identity(config, parts)
    meta = {
        "method": to_dict(config.method),
        "backbone": parts.backbone_identity,
        "template_hash": task.template_hash,
        "trainable_params": identity["trainable_params"],
        "config": to_dict(config),
        "paths": (paths := paths_of(config)),
        "seal": seal(paths),
    }
    tracker.say(
        f"{config.method.name}: {identity['trainable_params']:,} trainable parameters on {config.backbone.name} "
        f"({parts.backbone_parameters:,} in all), device {accelerator.device}"
    )

    tracker.say(preflight.run(config, model, gradients=True))

    def score(shown: Task, items: dict[str, list[Encoded]], split: str) -> Evaluation:
        size = config.trainer.eval_batch_size
        return evaluate_split(model, config.task, shown.splits[split], items[split], size, accelerator)

    metric = config.task.metrics[0]
    zero_shot = None
    if config.zero_shot:
        items = parts.items if parts.bare is task else encode(config, parts.bare, parts.backbone, 0)[0]
        with model.disabled():
            zero_shot = score(parts.bare, items, "test").values
        tracker.say(f"zero-shot {metric} on test: {zero_shot[metric]:.4f}")

    def keep(tensors: dict[str, torch.Tensor], step: int) -> None:
        save_adapter(folder, tensors, {**meta, "step": step})

    stages.fit(config, model, parts.items["train"], accelerator)
    training, trainer = stages.train(config, model, parts.items, accelerator, folder, tracker, keep)
    for line in stages.report(config, model, parts.items["dev"], accelerator, folder):
        tracker.say(line)
    dev, test = score(task, parts.items, "dev"), score(task, parts.items, "test")
    summary = Summary(
        **identity,
        init_from=parts.origin.record() if parts.origin else None,
        zero_shot=zero_shot[metric] if zero_shot else None,
        dev=dev.values[metric],
        test=test.values[metric],
        majority=task.majority("test"),
        metrics={"zero_shot": zero_shot, "dev": dev.values, "test": test.values},
        **training,
        preflight=model.preflight,
        status=OK,
        **circumstances(parts.accelerator),
    )
    tracker.log(training["steps"], {f"dev_{metric}": summary.dev, f"test_{metric}": summary.test})
    if accelerator.is_main_process:
        summary.note = diagnose(stages.facts(config, summary, test, folder))
        write_rows(folder / PREDICTIONS, test.predictions)
        write_summary(folder, summary)
    if trainer:
        trainer.finish()
    tracker.finish()
    model.detach()
    return summary


def _identity(config: Config, parts: Parts) -> dict[str, Any]:
    """The fields of a `Summary` that say what was run."""
    return {
        "task": config.task.name,
        "method": config.method.name,
        "backbone": config.backbone.name,
        "seed": config.seed,
        "trainable_params": sum(p.numel() for p in parts.model.trainable().values()),
        "metric": config.task.metrics[0],
        "protocol": config.protocol,
        "template_hash": parts.task.template_hash,
        "data_fingerprint": parts.task.fingerprint,
        "backbone_fingerprint": parts.backbone_identity["fingerprint"],
        "budget": parts.fitted.record() if parts.fitted else None,
    }
