"""Hooks on a backbone's decoder layers: how edits get in, and instruction states out.

A plan says what the hooks do during one pass; without one they do nothing, so other users of the backbone never
notice them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iapt.config.errors import UserError
from iapt.model.cache import CacheEdit
from iapt.model.edits.base import AfterModule, BeforeModule, Edit, Plan


class LayerHooks:
    """Hooks on the decoder layers, and on parts of them for the edits that reach there.

    Args:
        layers: the decoder layers, in order.
        edits: what is done in a pass, in this order.
        name: what errors call the method.
        checkpointing: the layers may recompute their activations in the backward pass.

    Attributes:
        plan: of the passes to come, None for none of ours.
        recompute: whether the layers keep no activations in the passes to come.

    Raises:
        UserError: if a layer lacks what an edit reaches for.
    """

    def __init__(
        self, layers: Sequence[nn.Module], edits: Sequence[Edit], name: str, checkpointing: bool = False
    ) -> None:
        self.plan: Plan | None = None
        self.recompute = False
        self.layers = layers
        self._edits, self._name = edits, name
        self._handles: list[Any] = []
        try:
            for index, layer in enumerate(layers):
                if checkpointing:
                    self._wrap(index, layer)
                else:
                    self.before(layer, partial(self._before_layer, index))
            for edit in edits:
                edit.install(self)
        except UserError:
            self.remove()
            raise

    def _wrap(self, index: int, layer: nn.Module) -> None:
        """Make the layer recompute itself, the soft tokens in front of it included, while `recompute` is on.

        Not by transformers' own switch: that one drops the cache, and asks for train mode, in which some frozen
        layers would drop activations out.
        """
        forward = layer.forward

        def run(plan: Plan | None, *args: Any, **kwargs: Any) -> Any:
            was, self.plan = self.plan, plan  # in the backward pass it is another one, or none
            try:
                if plan is not None:
                    args, kwargs = self._before_layer(index, plan, layer, args, kwargs) or (args, kwargs)
                return forward(*args, **kwargs)
            finally:
                self.plan = was

        def saving(*args: Any, **kwargs: Any) -> Any:
            if not (self.recompute and torch.is_grad_enabled()):
                return run(self.plan, *args, **kwargs)
            return checkpoint(run, self.plan, *args, use_reentrant=False, **kwargs)

        layer.forward = saving
        self._handles.append(_Wrapped(layer, saving))

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()

    def before(self, module: nn.Module, act: BeforeModule) -> None:
        """Install a hook; see `Site.before`."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if self.plan is None else act(self.plan, module, args, kwargs)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, act: AfterModule) -> None:
        """Install a hook; see `Site.after`."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return None if self.plan is None else act(self.plan, output)

        self._handles.append(module.register_forward_hook(hook))

    def _before_layer(
        self, index: int, plan: Plan, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given: Tensor = args[0] if args else kwargs["hidden_states"]
        if given.dim() != 3:
            raise UserError(
                f"method: {self._name} reads or writes hidden states (rows, tokens, width), and "
                f"{type(layer).__name__} is handed several streams of them, {tuple(given.shape)}; weight-space "
                "methods (method=lora) can do without"
            )
        if plan.record is not None:
            plan.record.append(given)
            return None
        hidden = given
        for edit in self._edits:
            hidden = edit.before_layer(plan, index, hidden)
        if hidden is given:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def on_cache(self, plan: Plan) -> CacheEdit | None:
        """Return the function that changes the keys and values written in a pass, or None to keep them."""
        found = [act for edit in self._edits if (act := edit.on_cache(plan)) is not None]
        if not found:
            return None

        def edited(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            for act in found:
                keys, values = act(layer, keys, values)
            return keys, values

        return edited

    @contextmanager
    def entering(self, plan: Plan | None, embeddings: nn.Module) -> Iterator[None]:
        """A context in which others run the backbone behind a prefix: its plan holds, and the first tokens that the
        table of embeddings is asked for enter as the edits have them."""
        if plan is None:
            yield
            return
        first = [plan]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return enter(first.pop(), output) if first else None

        handle = embeddings.register_forward_hook(hook)
        self.plan = plan
        try:
            yield
        finally:
            self.plan = None
            handle.remove()


def enter(plan: Plan, embeds: Tensor) -> Tensor:
    """The embeddings (B, T, d) of what runs first behind a prefix, as the edits have them."""
    for edit, kept in plan.kept.items():
        embeds = edit.enter(kept, embeds)
    return embeds


class _Wrapped:
    """The handle of a layer whose forward pass was replaced, by `remove` as it was."""

    def __init__(self, layer: nn.Module, own: Callable[..., Any]) -> None:
        self._layer, self._own = layer, own

    def remove(self) -> None:
        # Where another model has wrapped the layer since, its wrapper goes on calling ours, which does nothing.
        if vars(self._layer).get("forward") is self._own:
            del self._layer.forward
