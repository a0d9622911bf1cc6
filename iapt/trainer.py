"""The training loop: AdamW on the adapter, linear warm-up and decay, dev loss, patience, resumable.

Accelerate gives it processes and devices. Gradients are averaged here, in one flat all-reduce, instead of by a
DDP wrapper: only adapters carry gradients, they are small, and the three verbs of the model stay callable.

One process or many, accumulated or not, a step is the same: the global batch is cut into equal parts, every part's
loss is summed over its response tokens and divided by the count of the whole batch (a mean of means would weigh
tokens by how they happened to be dealt out).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from iapt.batch import Encoded, collate, training_batches
from iapt.checkpoint import drop_state, load_state, save_state
from iapt.config import TrainerConfig
from iapt.errors import TrainingError
from iapt.evaluate import mean_loss
from iapt.model import AdaptedModel
from iapt.tracking import Tracker


@dataclass
class TrainResult:
    """What training did.

    Attributes:
        steps: optimiser steps taken.
        best_step: the step whose adapter is kept; 0 is the untrained start.
        best_dev_loss: its dev loss, nats a token.
        seconds: wall time of the steps, evaluation left out.
        tokens_per_second: instruction and response tokens, padding not counted, over all processes.
        best: the kept adapter's tensors.
    """

    steps: int
    best_step: int
    best_dev_loss: float
    seconds: float
    tokens_per_second: float
    best: dict[str, Tensor]


class Trainer:
    """Train a model's adapter.

    Args:
        model: on its device.
        config: the protocol; `batch_size` and `max_steps` may be null, see `protocol_batch_size`.
        accelerator: processes and device.
        train: encoded training examples.
        dev: encoded examples whose loss selects the checkpoint.
        seed: of the order of examples.
        folder: where the resumable state lives.
        tracker: told about every evaluation and every `log_every` steps.
        gradient_accumulation: parts of a batch that one process computes after each other.
        on_best: called with the tensors and the step of every new best adapter, on the main process.
    """

    def __init__(
        self,
        model: AdaptedModel,
        config: TrainerConfig,
        accelerator: Accelerator,
        train: Sequence[Encoded],
        dev: Sequence[Encoded],
        *,
        seed: int,
        folder: Path,
        tracker: Tracker,
        gradient_accumulation: int = 1,
        on_best: Callable[[dict[str, Tensor], int], None] | None = None,
    ) -> None:
        self.model, self.config, self.accelerator, self.tracker = model, config, accelerator, tracker
        self.train_items, self.dev_items = train, dev
        self.seed, self.folder = seed, folder
        self.accumulation = gradient_accumulation
        self.on_best = on_best
        self.batch_size = config.batch_size or protocol_batch_size(len(train))
        steps_per_epoch = math.ceil(len(train) / self.batch_size)
        self.steps_per_epoch = steps_per_epoch
        self.total = config.max_steps or config.epochs * steps_per_epoch
        self.parameters = list(model.trainable().values())
        self.groups = self._parameter_groups()
        self.optimizer = torch.optim.AdamW(self.groups)
        warmup = math.ceil(config.warmup_ratio * self.total)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, warmup, self.total)
        self.step = self.best_step = self.stale = self.tokens = 0
        self.seconds = 0.0
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {}
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def run(self, *, resume: bool = False) -> TrainResult:
        """Train to the end, or until patience runs out.

        Raises:
            TrainingError: a loss that is not finite.
            UserError: a state that cannot be read.
        """
        if resume:
            self._restore()
        if self.step == 0 and not self.best:
            self._evaluate()  # so that "no better than the untrained adapter" is a possible outcome
        self.tracker.start_progress(self.total, self.step)
        try:
            while self.step < self.total and self.stale < self.config.patience:
                self._train_step()
                if self.step % self.config.eval_every == 0 or self.step == self.total:
                    self._evaluate()
        finally:
            self.tracker.stop_progress()
        if self.step < self.total:
            self.tracker.say(f"stopped at step {self.step}: {self.stale} evaluations without a better dev loss")
        self.model.load_adapter_state(self.best)
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return TrainResult(self.step, self.best_step, self.best_loss, self.seconds, rate, self.best)

    def finish(self) -> None:
        """Drop the resumable state: the run's results are written."""
        if self.accelerator.is_main_process:
            drop_state(self.folder)

    def _batch(self, step: int) -> list[int]:
        """The global batch of a step, a function of seed and step alone: resuming needs no iterator's state."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            grouped = self.config.group_by_length
            batches = training_batches(self.train_items, self.batch_size, self.seed, epoch, grouped)
            self._epoch = epoch, batches
        return self._epoch[1][position]

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The shared group first, then one for each of the method's own rates."""
        config, rates = self.config, self.model.method.own_rates if self.model.method else {}
        named = self.model.trainable()
        groups = []
        for prefix in [None, *rates]:
            parameters = [
                p for name, p in named.items() if next((r for r in rates if name.startswith(r)), None) == prefix
            ]
            rate = config.learning_rate if prefix is None else rates[prefix]
            decay = config.weight_decay if prefix is None else 0.0
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
        return groups

    def _train_step(self) -> None:
        start = time.perf_counter()
        indices = self._batch(self.step)
        loss = self._backward(indices)
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss is {loss} at step {self.step + 1}; the last good state is in {self.folder}. A smaller "
                f"trainer.learning_rate (now {self.config.learning_rate}) usually helps"
            )
        for group in self.groups:
            nn.utils.clip_grad_norm_(group["params"], self.config.max_grad_norm)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += sum(len(self.train_items[i].instruction) + len(self.train_items[i].response) for i in indices)
        self.seconds += time.perf_counter() - start
        logged = self.step % self.config.log_every == 0
        if logged:
            self.tracker.log(self.step, {"train_loss": loss, "learning_rate": rate})
        speed = self.tokens / self.seconds
        eta = (self.total - self.step) * self.seconds / self.step
        status = f"loss {loss:.4f}  lr {rate:.2e}  {speed:,.0f} tokens/s  eta {eta:.0f}s"
        self.tracker.advance(self.step, self.total, status, line=logged)

    def _backward(self, indices: Sequence[int]) -> float:
        """Gradients of the global batch's mean token loss, on every process; returns that loss."""
        self.model.train()
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        count = sum(len(self.train_items[i].response) for i in indices)
        total = torch.zeros((), device=self.accelerator.device)
        parts = world * self.accumulation
        for part in range(rank * self.accumulation, (rank + 1) * self.accumulation):
            share = indices[part::parts]
            # A part of the epoch's short last batch may be empty; its process still has to run the same layers.
            weight = 1.0 if share else 0.0
            items = [self.train_items[i] for i in share or indices[:1]]
            batch = collate(items, self.model.backbone.tokenizer.pad_token_id).to(self.accelerator.device)
            loss = self.model.loss(batch, "sum") * (weight / count)
            loss.backward()
            total += loss.detach()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        if world > 1:
            flat = torch.cat([total.reshape(1), *(g.flatten() for g in gradients)])
            total, *summed = self.accelerator.reduce(flat, "sum").split([1, *(g.numel() for g in gradients)])
            gradients = [s.view_as(g) for s, g in zip(summed, gradients, strict=True)]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return float(total)

    def _evaluate(self) -> None:
        """Dev loss; keep the adapter if it is the best; save the state a killed run continues from."""
        loss = mean_loss(self.model, self.dev_items, self.config.eval_batch_size, self.accelerator)
        if not math.isfinite(loss):
            raise TrainingError(f"dev loss is {loss} at step {self.step}")
        better = loss < self.best_loss
        if better:
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
            self.best = self.model.adapter_state()
        else:
            self.stale += 1
        self.tracker.log(self.step, {"dev_loss": loss})
        note = "best so far" if better else f"best {self.best_loss:.4f} at step {self.best_step}"
        self.tracker.say(f"step {self.step}/{self.total}  dev loss {loss:.4f}  ({note})")
        random = gather_object([_random_state(self.accelerator.device)])
        if not self.accelerator.is_main_process:
            return
        if better and self.on_best:
            self.on_best(self.best, self.step)
        save_state(
            self.folder,
            {
                "step": self.step,
                "adapter": self.model.adapter_state(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "best": self.best,
                "best_step": self.best_step,
                "best_loss": self.best_loss,
                "stale": self.stale,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "random": random,
            },
        )

    def _restore(self) -> None:
        state = load_state(self.folder)
        if state is None:
            self.tracker.rewind(-1)
            return
        self.model.load_adapter_state(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for name in ("step", "best", "best_step", "best_loss", "stale", "tokens", "seconds"):
            setattr(self, name, state[name])
        random = state["random"]
        if len(random) == self.accelerator.num_processes:  # else: resumed on other hardware, nothing to put back
            _set_random_state(random[self.accelerator.process_index], self.accelerator.device)
        self.tracker.rewind(self.step)
        self.tracker.say(f"resumed at step {self.step}")


def protocol_batch_size(train_size: int) -> int:
    """16 below 10,000 training examples, else 128 (label S)."""
    return 16 if train_size < 10_000 else 128


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
