"""The contract between a method and the model: what a method may offer, and what it is asked when.

A *prompt-space* method is an `nn.Module` that answers which soft tokens a layer sees (`SoftPrompt`). A
*weight-space* method changes the backbone's modules (`WeightMethod`).

Letters such as (label S) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from iapt.data.batch import Batch
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.edits.layer_input import LayerInput


class Passes(Protocol):
    """The questions that a method may ask of the model it is a part of (`iapt.model.adapted.AdaptedModel`).

    Attributes:
        backbone: the frozen LM with its tokenizer.
        lm: the LM by itself.
        method: the method, None for the bare backbone.
    """

    backbone: Backbone
    lm: PreTrainedModel
    method: Method | None

    def disabled(self) -> AbstractContextManager[None]:
        """Return a context in which the model is the bare backbone."""

    def response_logits(self, batch: Batch) -> Tensor:
        """(B, R, V): the logits that predict each response token, with gradient."""

    def instruction_states(self, batch: Batch) -> Tensor:
        """(B, d): the last hidden states of the instructions' last tokens, with gradient."""

    def likelihoods(self, batch: Batch) -> Tensor:
        """(B, C): the log-likelihood of every choice in nats, with gradient."""

    def score(self, batch: Batch) -> Tensor:
        """(B, C): what choices are compared by."""


@dataclass(frozen=True)
class BiLevel:
    """Two kinds of steps in alternation, each on data of its own: first-order bi-level training (label S).

    Attributes:
        prefix: parameters whose saved name starts with it learn on held-out batches, all others on train batches.
        source: where held-out batches come from: `train` (a share carved from it, which then trains nothing
            else) or `dev` (the split that also selects the checkpoint).
        share: the carved share.
    """

    prefix: str
    source: str = "train"
    share: float = 0.1


_SAID_BY = {"objective": "has_objective", "label_scores": "scores_labels", "adjust_scores": "adjusts_scores"}


class Method(nn.Module):
    """The base of both kinds of method. All but `trainable` are offers that most methods leave alone.

    Attributes:
        lr_overrides: learning rates for parameters whose saved name starts with the key; these form groups of
            their own, without weight decay and with their own gradient clip.
        bilevel: which parameters learn on held-out batches, None for ordinary training.
        has_objective: whether `objective` is asked.
        scores_labels: whether `label_scores` is asked, which needs a pass of its own.
        adjusts_scores: whether `adjust_scores` is asked.
    """

    has_objective: ClassVar[bool] = False
    scores_labels: ClassVar[bool] = False
    adjusts_scores: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Others decide by the attributes, so an offer that does not say itself would be passed over in silence.
        for offer, said in _SAID_BY.items():
            if offer in vars(cls) and not getattr(cls, said):
                raise TypeError(f"{cls.__name__} has {offer}, so it needs {said} = True")

    lr_overrides: dict[str, float]
    bilevel: BiLevel | None

    def __init__(self) -> None:
        super().__init__()
        self.lr_overrides = {}
        self.bilevel = None

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained tensors under the names they are saved by."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def idle(self) -> frozenset[str]:
        """The trained tensors that nothing depends on, by design: with these settings, or as far as training has come.

        Every other one has to get a gradient (`iapt.preflight`).
        """
        return frozenset()

    def fit(self, model: Passes, batches: Iterable[Batch]) -> None:
        """Set what is learned without gradients (in buffers), before the first step; batches are train examples."""

    def on_train_start(self, total_steps: int) -> None:
        """Training begins and will take so many optimiser steps at most."""

    def penalty(self) -> Tensor | None:
        """A scalar added to the loss of every step, None for none."""
        return None

    def after_step(self, step: int) -> None:
        """Optimiser step `step` (from 1) was taken; the gradients still stand."""

    def on_phase_change(self, step: int) -> bool:
        """Change what is trained now that step `step` (from 1) lies behind; say whether anything was changed.

        Where it was, training starts anew: the trainer asks for `trainable`, `lr_overrides` and `bilevel` again,
        forgets what its optimiser remembers, warms up and decays over the steps that are left, and looks at the dev
        loss.
        """
        return False

    def can_be_checkpoint(self, step: int) -> bool:
        """Say whether the adapter as it is after step `step` (0: untrained) may be the one that is kept.

        Where it may not, its dev loss is looked at but wears no patience. The run's last step always may.
        """
        return True

    def training_state(self) -> dict[str, Any]:
        """The values and tensors, besides the parameters, that `after_step` and `on_phase_change` need on resuming."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Put back what `training_state` gave; `start` was called before, parameters and buffers are the saved ones."""

    def objective(self, model: Passes, batch: Batch) -> Tensor | None:
        """Return what is minimised instead of the response tokens' cross-entropy, on `batch` of the adapted `model`.

        Asked in training and for the dev loss; `self.training` tells them apart.

        Returns:
            A scalar, the sum over the batch in which a row counts once for each of its response tokens, as it does
            in the cross-entropy; None for the cross-entropy itself.
        """
        return None

    def label_scores(self, model: Passes, batch: Batch) -> Tensor | None:
        """Scores (B, C) of every row's choices instead of their log-likelihoods; None for those."""
        return None

    def adjust_scores(self, scores: Tensor) -> Tensor:
        """Log-likelihoods of the choices (B, C) -> the scores that predictions are made from."""
        return scores

    def observed(self) -> Sequence[nn.Module]:
        """Activation functions, one a layer, whose inputs and curves are worth a picture in the run folder."""
        return ()

    def findings(self) -> list[str]:
        """Lines for the user about what training has made of the method."""
        return []


class SoftPrompt(Method):
    """A prompt-space method: which soft tokens does layer l see, given that layer's instruction states?

    `num_soft_tokens`, `position` and `input_embeddings` say what stands in the soft columns when a pass begins. All
    that happens in the pass itself is the business of `edits`.

    Attributes:
        num_soft_tokens: s, the columns the engine reserves.
        position: `before_instruction` ([P, instruction, response]) or `after_instruction`
            ([instruction[:-1], P, instruction[-1], response]).
        starts_from: other registered methods whose adapters `init_from` may name.
    """

    num_soft_tokens: int
    position: str
    starts_from: tuple[str, ...] = ()

    def adopt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state to start from, by name, given the tensors of the adapter that `init_from` names."""
        return tensors

    def learn_from(self, source: Passes, target: Backbone) -> None:
        """Take the trained model that the setting `source` names for a teacher; called before training."""
        raise NotImplementedError

    def input_embeddings(self) -> Tensor | None:
        """(s, d): soft tokens that enter as token embeddings do, ahead of whatever the model does to those
        (scaling, position embeddings). None: the columns start as zeros."""
        return None

    def edits(self) -> Sequence[Edit]:
        """Return what the method does to a pass, in this order, each kind once at most. It is asked when a model is
        built.

        `iapt.model.edits` holds those that there are, and a method may bring one of its own. Without any the soft
        tokens run through the layers as tokens do.
        """
        return (LayerInput(self),)

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor | None:
        """The soft tokens that go into decoder layer `layer`: what the edit `LayerInput` asks.

        Args:
            layer: 0-based index of the decoder layer about to run; never one in which the soft columns are hidden.
            states: (B, N, d) hidden states of the instruction's tokens, those that the edit reads: right before that
                layer unless it says otherwise.
            mask: (B, N) bool, False on padding.
            previous: (B, s, d) what stands at the soft positions now: at layer 0 `input_embeddings` or zeros,
                as the model embeds them; afterwards the output of the layer below.

        Returns:
            (B, s, d) in any float dtype, or None to leave `previous` as it is.
        """
        raise NotImplementedError


class WeightMethod(Method):
    """A weight-space method: trainable tensors that live inside the backbone's own modules.

    Attributes:
        active: what hooks ask before they change anything.
    """

    active: bool

    def __init__(self) -> None:
        super().__init__()
        self.active = True

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the backbone computes exactly what it computed before the method was added.

        Methods that act through hooks need no more than `active`; the others replace this.
        """
        was, self.active = self.active, False
        try:
            yield
        finally:
            self.active = was
