"""The training loop: AdamW on the adapter, linear warm-up and decay, dev loss, patience, resumable.

Accelerate gives it processes and devices. Gradients are averaged here, in one flat all-reduce, instead of by a
DDP wrapper: only adapters carry gradients, they are small, and the three verbs of the model stay callable.

One process or many, accumulated or not, a step is the same: the global batch is cut into equal parts, every part's
loss is summed over its response tokens and divided by the count of the whole batch (a mean of means would weigh
tokens by how they happened to be dealt out).

A method may ask for first-order bi-level training (label S, after DARTS): then a step is two, one on a train batch
for most parameters and one on a held-out batch for the others, each with the rest fixed. A method may also change what
is trained in the middle of a run (`Method.on_phase_change`), and say which adapters may be kept
(`Method.can_be_checkpoint`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from iapt.config.errors import TrainingError
from iapt.config.schema import TrainerConfig
from iapt.data.batch import Encoded, collate
from iapt.evaluation.evaluate import mean_loss
from iapt.model.adapted import AdaptedModel
from iapt.training.phases import Phase, phases, protocol_batch_size
from iapt.training.state import drop_state, load_state, save_state
from iapt.training.tracking import Tracker


@dataclass
class TrainResult:
    """What training did.

    Attributes:
        steps: optimiser steps taken.
        best_step: the step whose adapter is kept, among those that the method lets be kept; 0 is the untrained start.
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
        config: the protocol; `batch_size` and `max_steps` may be null, see `protocol_batch_size`. `learning_rate` may
            not: a run's `Config` puts the method's own in its place.
        accelerator: processes and device.
        train: encoded training examples; bi-level training may hold some of them out.
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
        if config.learning_rate is None:
            raise ValueError("trainer.learning_rate = null: only a run's Config knows the method's own")
        self.learning_rate = config.learning_rate
        self.gradient_norms: list[Tensor] = []
        self.model, self.config, self.accelerator, self.tracker = model, config, accelerator, tracker
        self.dev_items, self.folder = dev, folder
        self.accumulation = gradient_accumulation
        self.on_best = on_best
        assert model.method is not None
        self.method = model.method
        self.batch_size = config.batch_size or protocol_batch_size(len(train))
        self._make_phases = partial(phases, model, train, dev, self.batch_size, seed, config.group_by_length)
        self.total = config.max_steps or config.epochs * self._make_phases()[0].batches.per_epoch
        self.method.on_train_start(self.total)
        self._begin(0)
        self.step = self.best_step = self.stale = self.tokens = 0
        self.seconds = 0.0
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {}

    def run(self, *, resume: bool = False) -> TrainResult:
        """Train to the end, or until patience runs out.

        Raises:
            TrainingError: a loss that is not finite.
            UserError: a state that cannot be read.
        """
        if not (resume and self._restore()):
            self._evaluate()  # so that "no better than the untrained adapter" is a possible outcome
        self.tracker.start_progress(self.total, self.step)
        try:
            while self.step < self.total and self.stale < self.config.patience:
                self._train_step()
                renewed = self.method.on_phase_change(self.step)
                if renewed:
                    self._begin(self.step)
                if renewed or self.step % self.config.eval_every == 0 or self.step == self.total:
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

    def _begin(self, step: int) -> None:
        """From `step` on the parameters that the method trains now, an optimiser without memory, and a schedule for the
        steps that are left."""
        self.begun, left = step, self.total - step
        self.phases = self._make_phases()
        self.groups = self.model.parameter_groups(self.learning_rate, self.config.weight_decay)
        self.optimizer = torch.optim.AdamW(self.groups)
        warmup = math.ceil(self.config.warmup_ratio * left)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, warmup, left)

    def _train_step(self) -> None:
        start = time.perf_counter()
        rate, *others = self.schedule.get_last_lr()
        losses = [self._optimise(phase) for phase in self.phases]
        self.schedule.step()
        self.step += 1
        self.seconds += time.perf_counter() - start
        logged = self.step % self.config.log_every == 0
        if logged:
            found = dict(zip(("train_loss", "held_out_loss"), losses, strict=False))
            rates = {f"learning_rate/{g['name']}": r for g, r in zip(self.groups[1:], others, strict=True)}
            norm = math.sqrt(sum(float(n) ** 2 for n in self.gradient_norms))
            self.tracker.log(self.step, {**found, "gradient_norm": norm, "learning_rate": rate, **rates})
        speed = self.tokens / self.seconds
        eta = (self.total - self.step) * self.seconds / self.step
        status = f"loss {losses[0]:.4f}  lr {rate:.2e}  {speed:,.0f} tokens/s  eta {eta:.0f}s"
        self.tracker.advance(self.step, self.total, status, line=logged)

    def _optimise(self, phase: Phase) -> float:
        """One optimiser step of a phase's parameters; returns the batch's mean token loss, penalties left out."""
        first = phase is self.phases[0]
        for parameter in phase.fixed:
            parameter.requires_grad_(False)
        try:
            items = phase.batches(self.step)
            loss = self._backward(items, phase.parameters, penalised=first)
        finally:
            for parameter in phase.fixed:
                parameter.requires_grad_(True)
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss is {loss} at step {self.step + 1}; the last good state is in {self.folder}. A smaller "
                f"trainer.learning_rate (now {self.learning_rate}) usually helps"
            )
        norms = [nn.utils.clip_grad_norm_(group["params"], self.config.max_grad_norm) for group in self.groups]
        if first:
            self.gradient_norms = norms  # before they are clipped; on the device until somebody asks
        self.optimizer.step()  # passes over what has no gradient
        if first:
            self.method.after_step(self.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += sum(len(item.instruction) + len(item.response) for item in items)
        return loss

    def _backward(self, items: Sequence[Encoded], parameters: Sequence[nn.Parameter], *, penalised: bool) -> float:
        """Gradients of the global batch's mean token loss, on every process; returns that loss."""
        self.model.train()
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        count = sum(len(item.response) for item in items)
        total = torch.zeros((), device=self.accelerator.device)
        parts = world * self.accumulation
        for part in range(rank * self.accumulation, (rank + 1) * self.accumulation):
            share = items[part::parts]
            # A part of the epoch's short last batch may be empty; its process still has to run the same layers.
            weight = 1.0 if share else 0.0
            batch = collate(share or items[:1], self.model.backbone.pad_id).to(self.accelerator.device)
            loss = self.model.loss(batch, "sum") * (weight / count)
            loss.backward()
            total += loss.detach()
        penalty = self.method.penalty() if penalised and rank == 0 else None
        if penalty is not None:
            penalty.backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        if world > 1:
            flat = torch.cat([total.reshape(1), *(g.flatten() for g in gradients)])
            total, *summed = self.accelerator.reduce(flat, "sum").split([1, *(g.numel() for g in gradients)])
            gradients = [s.view_as(g) for s, g in zip(summed, gradients, strict=True)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return float(total)

    def _evaluate(self) -> None:
        """Dev loss; keep the adapter if it is the best that may be kept; save the state a killed run continues from."""
        loss = mean_loss(self.model, self.dev_items, self.config.eval_batch_size, self.accelerator)
        if not math.isfinite(loss):
            raise TrainingError(f"dev loss is {loss} at step {self.step}")
        # The last step's may be kept whatever the method says: there is something to keep at every run's end.
        selectable = self.step == self.total or self.method.can_be_checkpoint(self.step)
        better = selectable and loss < self.best_loss
        if better:
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
            self.best = self.model.adapter_state()
        elif selectable:
            self.stale += 1
        self.tracker.log(self.step, {"dev_loss": loss})
        note = "best so far" if better else f"best {self.best_loss:.4f} at step {self.best_step}"
        if not selectable:
            note = "too early to be kept"
        self.tracker.say(f"step {self.step}/{self.total}  dev loss {loss:.4f}  ({note})")
        random_states = gather_object([_random_state(self.accelerator.device)])
        if not self.accelerator.is_main_process:
            return
        if better and self.on_best:
            self.on_best(self.best, self.step)
        save_state(
            self.folder,
            {
                "step": self.step,
                "begun": self.begun,
                "adapter": self.model.adapter_state(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "best": self.best,
                "best_step": self.best_step,
                "best_loss": self.best_loss,
                "stale": self.stale,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "method": self.method.training_state(),
                "random": random_states,
            },
        )

    def _restore(self) -> bool:
        """Put a saved state back; False if there is none."""
        state = load_state(self.folder)
        if state is None:
            self.tracker.rewind(-1)
            return False
        self.model.load_adapter_state(state["adapter"])
        self.method.load_training_state(state["method"])
        self._begin(state["begun"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for name in ("step", "best", "best_step", "best_loss", "stale", "tokens", "seconds"):
            setattr(self, name, state[name])
        states = state["random"]
        if len(states) == self.accelerator.num_processes:  # else: resumed on other hardware, nothing to put back
            _set_random_state(states[self.accelerator.process_index], self.accelerator.device)
        self.tracker.rewind(self.step)
        self.tracker.say(f"resumed at step {self.step}")
        return True


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
