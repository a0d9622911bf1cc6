"""POST: a prompt tuned on a small backbone teaches one on a large backbone (Wang et al., ICML 2025).

Both read one tokenizer. With z the logits under a prompt, b the bare backbone's, D = z - b, s the source and t this
backbone with its own prompt, the one thing that is trained, each response position costs

    alpha T^2 KL(softmax(D_s / T) || softmax(D_t / T))  +  (1 - alpha) T^2 KL(softmax(z_s / T) || softmax(z_t / T))

Loss, alpha = 0.5 and T = 2 follow the authors' code (R). Theirs stands at the one answer position; here it is summed
over all response positions, each of which sees the response's earlier tokens (I). Which token is right is never asked,
in training or for the dev loss, so any instructions of the source's kind will do: the paper's public set is the `task`.

Not here: the distillation that gives the paper its small backbone; a start at the source's prompt, which wants
backbones of one width; and differential privacy, which belongs to the source's own training (per-example gradients,
noise, an accountant): this objective reads nothing but the finished source.

The source is read before training starts, and is no part of the adapter: a saved one loads without it.

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from iapt.config.errors import UserError
from iapt.config.fields import at_least
from iapt.data.batch import Batch
from iapt.methods.prompt_tuning import PromptTuning, PromptTuningConfig, count, draw_start
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.method import Passes

KEY = "method.source"


@dataclass
class PostConfig(PromptTuningConfig):
    """The settings of POST. `source` is the run to learn from: a run of any soft-prompt method, on a backbone with
    this one's vocabulary.
    """

    learning_rate: float = at_least(3e-2, 0)
    source: str | None = field(default=None, metadata={"adapter": True})
    alpha: float = at_least(0.5, 0)
    temperature: float = at_least(2.0, 0)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.source is None:
            found.append(f"{KEY} = null: post learns from a soft prompt on another backbone; give that run's folder")
        if self.alpha > 1:
            found.append(f"method.alpha = {self.alpha}: a share, 0 to 1")
        if self.temperature <= 0:
            found.append(f"method.temperature = {self.temperature}: must be above 0")
        return found


class Post(PromptTuning):
    """A `PromptTuning` with an objective of its own."""

    has_objective = True

    def __init__(self, config: PostConfig, start: Tensor) -> None:
        super().__init__(start, config.position)
        self.config = config
        self._source: tuple[Passes, ...] = ()  # in a tuple, where nn.Module sees no submodule

    def learn_from(self, source: Passes, target: Backbone) -> None:
        """Take `source`, frozen and in eval mode, for the teacher of a prompt on `target`.

        Raises:
            UserError: if their vocabularies differ.
        """
        sizes = [backbone.lm.config.vocab_size for backbone in (source.backbone, target)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{KEY} = {self.config.source}: its backbone has {sizes[0]} tokens, this one {sizes[1]}")
        theirs, ours = (backbone.tokenizer.get_vocab() for backbone in (source.backbone, target))
        if theirs != ours:
            strange = next(token for token, number in theirs.items() if ours.get(token) != number)
            raise UserError(
                f"{KEY} = {self.config.source}: its backbone's tokenizer is not this one's: token {theirs[strange]} is "
                f"{strange!r} there"
            )
        source.lm.requires_grad_(False)
        if source.method is not None:
            source.method.requires_grad_(False).eval()
        self._source = (source,)

    def objective(self, model: Passes, batch: Batch) -> Tensor:
        """The two divergences, in training and for the dev loss. Raises UserError for a source that does not fit."""
        if not self._source:
            raise UserError(f"{KEY} = {self.config.source}: nothing to learn from; call learn_from before training")
        alpha, temperature = self.config.alpha, self.config.temperature
        # The pass that carries gradient comes last: activation checkpointing repeats the last one.
        with torch.no_grad():
            source_bare, source = (logits.to(model.lm.device) for logits in _both(self._source[0], batch))
            with model.disabled():
                bare = _logits(model, batch)
        target = _logits(model, batch)
        shifts = _divergence(source - source_bare, target - bare, temperature)
        answers = _divergence(source, target, temperature)
        cost = temperature**2 * (alpha * shifts + (1 - alpha) * answers)
        return (cost * batch.response_mask).sum()


def _both(source: Passes, batch: Batch) -> tuple[Tensor, Tensor]:
    """The source's logits without and with its prompt."""
    moved = batch.to(source.lm.device)
    with source.disabled():
        bare = _logits(source, moved)
    return bare, _logits(source, moved)


def _logits(model: Passes, batch: Batch) -> Tensor:
    logits = model.response_logits(batch)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) over the last dimension."""
    p, q = (logits.div(temperature).log_softmax(-1) for logits in (teacher, student))
    return (p.exp() * (p - q)).sum(-1)


def build(config: PostConfig, backbone: Backbone) -> Post:
    """Raises UserError if `init_text` has no tokens."""
    return Post(config, draw_start(config, backbone))


register("post", MethodSpec(PostConfig, build, count))
