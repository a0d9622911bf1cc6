"""Forward pre-hooks on a backbone's decoder layers: how soft tokens get in, and instruction states out.

A plan says what the hooks do during one pass; without one they do nothing, so other users of the backbone never
notice them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from iapt.config.errors import UserError
from iapt.model.architecture import MaskArgument, attention_of, check_keys_and_values, mask_argument, part_of
from iapt.model.method import SoftPrompt


@dataclass
class Plan:
    """What the hooks do during one pass over the decoder.

    Attributes:
        mask: (B, N) bool, the instruction's.
        slots: (B, s) int64, the columns of this pass that soft tokens are written into; None: none are.
        columns: (B, N) int64, where this pass holds the instruction's states; None if `states` gives them.
        states: the instruction's states, one (B, N, d) a layer.
        record: every layer's input is appended here; nothing is written then.
        soft: (B, s) int64, where the soft tokens stand among all columns, the cached ones included.
        scales: layer and part of it -> (B, width), what its output is multiplied by; filled by the pass over the
            instruction, and still there for what follows it.
        first: (B, 1, d), stands for the first token that is embedded after the prefix.
        hidden: the layers in which no other token sees the soft columns.
        cache: what earlier passes have kept, None for nothing.
        written: layer -> what the method answered there, so that a second pass writes the same without asking; None
            where there is no second pass.
    """

    mask: Tensor
    slots: Tensor | None = None
    columns: Tensor | None = None
    states: Sequence[Tensor] = ()
    record: list[Tensor] | None = None
    soft: Tensor | None = None
    scales: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    first: Tensor | None = None
    hidden: frozenset[int] = frozenset()
    cache: Cache | None = None
    written: dict[int, Tensor | None] | None = None

    def repeat(self, copies: int) -> None:
        """Every row `copies` times, for beams and samples; for plans of a continuation."""
        self.soft, self.first = (t if t is None else t.repeat_interleave(copies, 0) for t in (self.soft, self.first))
        self.scales = {place: scale.repeat_interleave(copies, 0) for place, scale in self.scales.items()}


class LayerHooks:
    """Hooks on the decoder layers, and on parts of them and the embedding table for the methods that reach there.

    Args:
        layers: the decoder layers, in order.
        embeddings: the table of token embeddings.
        method: whose soft tokens are written; any other method, or None, has none.
        checkpointing: the layers may recompute their activations in the backward pass.

    Attributes:
        plan: what to do in the passes to come.
        first: (B, 1, d), what the embedding table answers next time, and only then.
        recompute: whether the layers keep no activations in the passes to come.

    Raises:
        UserError: if a layer lacks what the method reaches for.
    """

    def __init__(
        self, layers: Iterable[nn.Module], embeddings: nn.Module, method: nn.Module | None, checkpointing: bool = False
    ) -> None:
        self.plan: Plan | None = None
        self.first: Tensor | None = None
        self.recompute = False
        self._method = method
        self._handles: list[Any] = []
        try:
            for index, layer in enumerate(layers):
                self._register(index, layer, method, checkpointing)
            if isinstance(method, SoftPrompt) and method.edits_embeddings:
                self._handles.append(embeddings.register_forward_hook(self._after_embeddings))
        except UserError:
            self.remove()
            raise

    def _register(self, index: int, layer: nn.Module, method: nn.Module | None, checkpointing: bool) -> None:
        if checkpointing:
            self._wrap(index, layer)
        else:
            hook = partial(self._before_layer, index)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if not isinstance(method, SoftPrompt):
            return
        if method.edits_cache:
            check_keys_and_values(layer)
        if method.hides:
            attention = attention_of(layer)
            inner = partial(self._before_attention, index, mask_argument(attention))
            self._handles.append(attention.register_forward_pre_hook(inner, with_kwargs=True))
        for part in method.scales:
            module, columns, _ = part_of(layer, part)
            after = partial(self._after_part, (index, part), columns)
            self._handles.append(module.register_forward_hook(after))

    def _wrap(self, index: int, layer: nn.Module) -> None:
        """Make the layer recompute itself, the soft tokens in front of it included, while `recompute` is on.

        Not by transformers' own switch: that one drops the cache, and asks for train mode, in which some frozen
        layers would drop activations out.
        """
        forward = layer.forward

        def run(plan: Plan | None, *args: Any, **kwargs: Any) -> Any:
            was, self.plan = self.plan, plan  # in the backward pass it is another one, or none
            try:
                args, kwargs = self._before_layer(index, layer, args, kwargs) or (args, kwargs)
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

    def _before_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan = self.plan
        if plan is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if hidden.dim() != 3:
            raise UserError(
                f"method: {type(self._method).__name__} reads or writes hidden states (rows, tokens, width), and "
                f"{type(layer).__name__} is handed several streams of them, {tuple(hidden.shape)}; weight-space "
                "methods (method=lora) can do without"
            )
        if plan.record is not None:
            plan.record.append(hidden)
            return None
        if plan.slots is None:
            return None
        if plan.written is None:
            soft = self._ask(index, plan, hidden)
        else:
            if index not in plan.written:
                plan.written[index] = self._ask(index, plan, hidden)
            soft = plan.written[index]
        if soft is None:
            return None
        hidden = _put(hidden, plan.slots, soft)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _ask(self, index: int, plan: Plan, hidden: Tensor) -> Tensor | None:
        """What the method writes in front of layer `index`, whose input is hidden (B, K, d)."""
        assert isinstance(self._method, SoftPrompt)
        assert plan.slots is not None
        states = plan.states[index] if plan.columns is None else _take(hidden, plan.columns)
        # Where nothing sees the soft tokens, there is nothing to ask for.
        soft = None if index in plan.hidden else self._method(index, states, plan.mask, _take(hidden, plan.slots))
        if self._method.scales:
            scales = self._method.scale(index, states, plan.mask)
            plan.scales.update({(index, part): scale for part, scale in scales.items()})
        return soft

    def _after_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        first, self.first = self.first, None
        return first

    def _after_part(
        self, place: tuple[int, str], columns: Tensor | None, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        if self.plan is None or (scale := self.plan.scales.get(place)) is None:
            return None
        # OPT's feed-forward sees the rows of a batch as one long row, (B Q, width).
        rows = output.view(len(scale), -1, output.shape[-1])
        scale = scale.to(output.dtype)
        if columns is not None:  # the map computes other parts as well, and they stay
            ones = scale.new_ones(len(scale), output.shape[-1])
            scale = ones.index_copy(1, columns.to(scale.device), scale)
        return (rows * scale[:, None]).view_as(output)

    def _before_attention(
        self, index: int, argument: MaskArgument, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        plan = self.plan
        if plan is None or plan.soft is None or index not in plan.hidden:
            return None
        given = argument.signature.bind(*args, **kwargs)
        hidden: Tensor = given.arguments[argument.states]
        cached = plan.cache.get_seq_length(index) if plan.cache is not None else 0
        given.arguments[argument.name] = _hide(
            given.arguments.get(argument.name), plan.soft, hidden, cached, attention, argument.true_hides
        )
        return given.args, given.kwargs

    def edit(self, plan: Plan) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """What the method makes of the soft columns' keys and values in a pass; None if it leaves them alone."""
        method, slots = self._method, plan.slots
        if not isinstance(method, SoftPrompt) or not method.edits_cache or slots is None:
            return None

        def edited(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            if layer in plan.hidden:
                return keys, values
            soft = slots[:, None].expand(-1, keys.shape[1], -1)
            own = method.keys_values(layer, _take(keys, soft), _take(values, soft))
            return _put(keys, soft, own[0]), _put(values, soft, own[1])

        return edited


class _Wrapped:
    """The handle of a layer whose forward pass was replaced, by `remove` as it was."""

    def __init__(self, layer: nn.Module, own: Callable[..., Any]) -> None:
        self._layer, self._own = layer, own

    def remove(self) -> None:
        # Where another model has wrapped the layer since, its wrapper goes on calling ours, which does nothing.
        if vars(self._layer).get("forward") is self._own:
            del self._layer.forward


def _take(whole: Tensor, columns: Tensor) -> Tensor:
    """whole (..., K, d), columns (..., n) -> (..., n, d)."""
    return whole.gather(-2, columns[..., None].expand(*columns.shape, whole.shape[-1]))


def _put(whole: Tensor, columns: Tensor, part: Tensor) -> Tensor:
    """whole (..., K, d) with part (..., n, d) at columns (..., n)."""
    return whole.scatter(-2, columns[..., None].expand_as(part), part.to(whole.dtype))


def _hide(
    mask: Tensor | None, soft: Tensor, hidden: Tensor, cached: int, attention: nn.Module, true_hides: bool
) -> Tensor:
    """The attention mask with the soft columns hidden from every row but their own.

    Takes all forms that transformers hands to a layer: (B, 1, Q, K) bool or additive, (B, K) for flash attention,
    None where it leaves causality to the kernel.

    Args:
        soft: (B, s) int64, the soft columns among all K.
        hidden: (B, Q, d), the module's input.
        cached: K - Q.
        true_hides: a boolean mask is True at what is not seen.
    """
    rows = hidden.shape[1]
    columns = torch.arange(cached + rows, device=hidden.device)
    own = (columns[None, :, None] == soft[:, None]).any(-1)  # (B, K)
    config: Any = getattr(attention, "config", None)
    flash = "flash" in str(getattr(config, "_attn_implementation", ""))
    if mask is None:
        mask = torch.ones_like(own) if flash else (columns <= columns[cached:, None])[None, None] != true_hides
    if mask.dim() == 2:
        return mask.bool() & ~own
    # A row of nothing but hidden columns would make the softmax NaN, and NaN survives a weight of 0: the soft rows
    # go on seeing themselves.
    hide = (own[:, None, :] & ~own[:, cached:, None])[:, None]
    if mask.dtype != torch.bool:
        return mask.masked_fill(hide, torch.finfo(mask.dtype).min)
    return mask | hide if true_hides else mask & ~hide
