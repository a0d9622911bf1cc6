"""The stages of a run between building and scoring: fit, train, look at what was trained, say why it came out so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from iapt.config.schema import Config
from iapt.data.batch import Batch, Encoded, collate, evaluation_batches, training_batches
from iapt.evaluation.activations import observe, write_activations
from iapt.evaluation.evaluate import Evaluation
from iapt.folder.files import whole_rows
from iapt.folder.names import METRICS
from iapt.folder.summary import Summary
from iapt.model.adapted import AdaptedModel
from iapt.runs.diagnosis import Facts
from iapt.runs.prepare import generates
from iapt.training.tracking import Tracker
from iapt.training.trainer import Trainer

BATCHES_TO_REPORT = 8  # of dev, that a method's report is made from
UNTRAINED: dict[str, Any] = {  # fields of a `Summary`, as `train` returns them
    "best_step": 0,
    "best_dev_loss": None,
    "steps": 0,
    "total_steps": 0,
    "batch_size": None,
    "train_seconds": 0.0,
    "tokens_per_second": 0.0,
}


def fit(config: Config, model: AdaptedModel, train: Sequence[Encoded], accelerator: Accelerator) -> None:
    """Let the method look at training examples, in an order and with random numbers that every rank shares."""
    assert model.method is not None
    device, pad = accelerator.device, model.backbone.pad_id
    decoded = generates(config)

    def batches() -> Iterator[Batch]:
        for places in training_batches(train, config.trainer.eval_batch_size, config.seed, 0, False):
            batch = collate([train[i] for i in places], pad).to(device)
            # Where predictions are decoded there are no scores of choices to fit anything to.
            yield dataclasses.replace(batch, choice_ids=None, choice_mask=None) if decoded else batch

    model.train(False)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        model.method.fit(model, batches())


def train(
    config: Config,
    model: AdaptedModel,
    items: dict[str, list[Encoded]],
    accelerator: Accelerator,
    folder: Path,
    tracker: Tracker,
    keep: Callable[[dict[str, Tensor], int], None],
) -> tuple[dict[str, Any], Trainer | None]:
    """Train what there is to train; a method without any is saved as it is.

    Args:
        keep: saves the tensors of the best adapter so far, and its step; called on the main process.

    Returns:
        What the summary says about training, and the trainer, None if there was nothing for it to do.

    Raises:
        UserError, TrainingError: as `Trainer.run` does.
    """
    if not model.trainable():
        if accelerator.is_main_process:
            keep(model.adapter_state(), 0)
        return dict(UNTRAINED), None
    trainer = Trainer(
        model,
        config.trainer,
        accelerator,
        items["train"],
        items["dev"],
        seed=config.seed,
        folder=folder,
        tracker=tracker,
        gradient_accumulation=config.hardware.gradient_accumulation,
        on_best=keep,
    )
    result = trainer.run(resume=config.resume)
    return {
        "best_step": result.best_step,
        "best_dev_loss": result.best_dev_loss,
        "steps": result.steps,
        "total_steps": trainer.total,
        "batch_size": trainer.batch_size,
        "train_seconds": round(result.seconds, 3),
        "tokens_per_second": round(result.tokens_per_second, 1),
    }, trainer


def report(
    config: Config, model: AdaptedModel, dev: Sequence[Encoded], accelerator: Accelerator, folder: Path
) -> list[str]:
    """What the trained method has to show of itself, in files of the run folder and in lines for the user."""
    assert model.method is not None

    def encode() -> None:
        model.train(False)
        with torch.no_grad():
            for places in evaluation_batches(dev, config.trainer.eval_batch_size)[:BATCHES_TO_REPORT]:
                batch = collate([dev[i] for i in places], model.backbone.pad_id)
                model.prefill(batch.to(accelerator.device))

    lines = model.method.findings()
    if activations := model.method.observed():
        inputs = observe(activations, encode)  # on every process: sharded layers need all of them
        if accelerator.is_main_process:
            lines += write_activations(folder, activations, inputs)
    return lines


def facts(config: Config, summary: Summary, test: Evaluation, folder: Path) -> Facts:
    """What `diagnose` wants to know, from a summary, the test predictions and the folder's `metrics.jsonl`."""
    records = whole_rows(folder / METRICS)
    labels = [p["label"] for p in test.predictions] if config.task.label_column else []
    assert summary.trainable_params is not None
    assert summary.metric is not None
    assert summary.test is not None
    assert summary.best_step is not None
    assert summary.steps is not None
    assert summary.total_steps is not None
    return Facts(
        trainable_params=summary.trainable_params,
        metric=summary.metric,
        zero_shot=summary.zero_shot,
        test=summary.test,
        answers=[config.task.label_words[label] if label >= 0 else None for label in labels],
        majority=summary.majority,
        count=len(test.predictions),
        dev_losses=[(record["step"], record["dev_loss"]) for record in records if "dev_loss" in record],
        best_step=summary.best_step,
        steps=summary.steps,
        total=summary.total_steps,
        learning_rate=config.trainer.learning_rate or 0.0,
    )
