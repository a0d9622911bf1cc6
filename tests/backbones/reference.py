"""What a method computes on a backbone, by another road: one row, no padding, no cache, hooks made by hand.

Positions and masks are transformers' own defaults for a plain text, so nothing here knows what the engine tells a
model about them. Soft tokens are put in by hooks on the layers; keys and values are edited where the attention is
computed, by an attention function of our own (`AttentionInterface`), or, in the modules that have none, in a cache
that holds this one pass; a layer in which soft tokens are hidden is run without them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from iapt.model.adapted import AdaptedModel
from iapt.model.architecture import CACHE_NAMES, part_of
from iapt.model.edits.keys_values import KeysValues
from iapt.model.edits.layer_input import LayerInput
from iapt.model.edits.masked_layers import MaskedLayers
from iapt.model.edits.output_scale import OutputScale
from iapt.model.edits.word_embeddings import WordEmbeddings
from iapt.model.method import SoftPrompt

Edit = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
NAME = "by_hand"
# What reaches the attention function there is not what is cached: values in halves, heads repeated.
_REPEATED = ("diffllama", "jetmoe")


class NoRoadError(Exception):
    """This reference has no road of its own to what is asked."""


class _Attention:
    """The attention function that edits keys and values (1, H, K, d_h), and masks, before it calls the model's own."""

    edit: Edit | None = None
    hide: Callable[[int, Tensor | None], Tensor | None] | None = None
    asked: set[int]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # by position or, in some families, by this name
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        layer = int(module.layer_idx)
        self.asked.add(layer)
        if self.edit is not None:
            key, value = self.edit(layer, key, value)
        if self.hide is not None:
            attention_mask = self.hide(layer, attention_mask)
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", ALL_ATTENTION_FUNCTIONS["sdpa"])
        return own(module, query, key, value, attention_mask, *args, **kwargs)


_attention = _Attention()
AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


class _EditingCache(DynamicCache):
    """A cache for one pass over a whole text, which hands back edited keys and values."""

    def __init__(self, edit: Edit, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.edit, self.asked = edit, set[int]()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.asked.add(layer_idx)
        return super().update(*self.edit(layer_idx, key_states, value_states), layer_idx, *args, **kwargs)


class Reference:
    """A model's numbers by hand, for one row at a time; `roads`: which ways it took."""

    def __init__(self, model: AdaptedModel) -> None:
        self.model, self.lm, self.method = model, model.lm, model.method
        self.layers, self.roads = model.backbone.layers, set[str]()

    def logits(self, instruction: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
        """(R + 1, V): what predicts each response token, and the one behind it."""
        ids = torch.tensor([[*instruction, *response]])
        return self._run(ids, len(instruction))[0][0, -len(response) - 1 :]

    def state(self, instruction: tuple[int, ...]) -> Tensor:
        """(d,): the instruction's last token behind the last layer and its norm."""
        seen: list[Tensor] = []
        look = self._decoder().register_forward_hook(lambda module, args, output: seen.append(output[0]))
        try:
            self._run(torch.tensor([instruction]), len(instruction))
        finally:
            look.remove()
        return seen[-1][0, -1]

    def _decoder(self) -> nn.Module:
        lm = self.lm
        return next(m for m in (lm.get_decoder(), lm.base_model, getattr(lm, "model", None)) if m is not lm)

    def _run(self, ids: Tensor, n: int) -> tuple[Tensor, Any]:
        method = self.method
        if not isinstance(method, SoftPrompt):
            return self._pass(input_ids=ids)
        words = self.lm.get_input_embeddings()(ids)
        s, before = method.num_soft_tokens, method.position == "before_instruction"
        start = 0 if before else n - 1
        slots = list(range(start, start + s))
        columns = [*range(start), *range(start + s, n + s)]
        mask = torch.ones(1, n, dtype=torch.bool)
        given = method.input_embeddings()
        soft = torch.zeros(1, s, words.shape[-1]) if given is None else given[None]
        edits: dict[type, Any] = {type(edit): edit for edit in method.edits()}
        masked_layers = method.masked_layers if MaskedLayers in edits else frozenset()
        if WordEmbeddings in edits:
            words = torch.cat([method.edit_embeddings(words[:, :n], mask), words[:, n:]], 1)
        embeds = torch.cat([words[:, :start], soft, words[:, start:]], 1)
        states = self._bare_states(ids[:, :n], before)
        scales: dict[tuple[int, str], Tensor] = {}

        def write(layer: int, hidden: Tensor) -> Tensor:
            read = hidden[:, columns] if states is None else states[layer]
            if LayerInput in edits and layer not in masked_layers:
                answer = method(layer, read, mask, hidden[:, slots])
                if answer is not None:
                    hidden = hidden.clone()
                    hidden[:, slots] = answer.to(hidden.dtype)
            if OutputScale in edits:
                scales.update({(layer, part): scale for part, scale in method.scale(layer, read, mask).items()})
            return hidden

        def edit(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = keys.clone(), values.clone()
            keys[..., slots, :], values[..., slots, :] = method.keys_values(
                layer, keys[..., slots, :], values[..., slots, :]
            )
            return keys, values

        if masked_layers:
            return self._hiding(embeds, slots, write, before)
        parts = edits[OutputScale].parts if OutputScale in edits else ()
        with self._layer_hooks(write), self._part_hooks(parts, scales):
            return self._editing(embeds, edit) if KeysValues in edits else self._pass(inputs_embeds=embeds)

    def _bare_states(self, ids: Tensor, before: bool) -> list[Tensor] | None:
        """The instruction's states at every layer of a bare pass, None where they are those of the running pass."""
        assert isinstance(self.method, SoftPrompt)
        if any(edit.reads == "encoding" for edit in self.method.edits()):
            return [self._decoder()(input_ids=ids, use_cache=False)[0]] * len(self.layers)
        if before:
            return None
        seen: dict[int, Tensor] = {}

        def look(layer: int, hidden: Tensor) -> Tensor:
            seen[layer] = hidden
            return hidden

        with self._layer_hooks(look):
            self._pass(input_ids=ids)
        return [seen[layer] for layer in range(len(self.layers))]

    def _pass(self, **inputs: Any) -> tuple[Tensor, Any]:
        out = self.lm(**inputs, use_cache=False)
        return out.logits, out

    def _editing(self, embeds: Tensor, edit: Edit) -> tuple[Tensor, Any]:
        """A pass with edited keys and values."""
        if self.lm.config.model_type not in _REPEATED:
            with self._by_hand(edit=edit):
                found = self._pass(inputs_embeds=embeds)
                if _attention.asked >= self._attending():
                    self.roads.add("attention function")
                    return found
        cache = _EditingCache(edit)
        name = next(n for n in CACHE_NAMES if n in self._arguments())
        out = self.lm(inputs_embeds=embeds, use_cache=True, **{name: cache})
        if not cache.asked >= self._attending():
            raise NoRoadError("keys and values come by neither an attention function nor a cache")
        self.roads.add("cache of one pass")
        return out.logits, out

    def _arguments(self) -> set[str]:
        return {*signature(self.lm.forward).parameters, *signature(self._decoder().forward).parameters}

    def _attending(self) -> set[int]:
        return set(range(len(self.layers)))

    def _hiding(
        self, embeds: Tensor, slots: list[int], write: Callable[[int, Tensor], Tensor], before: bool
    ) -> tuple[Tensor, Any]:
        assert isinstance(self.method, SoftPrompt)
        masked_layers, last = self.method.masked_layers, len(self.layers) - 1

        def hide(layer: int, mask: Tensor | None) -> Tensor | None:
            if layer not in masked_layers:
                return mask
            assert mask is not None
            mask = mask.clone()
            others = [i for i in range(mask.shape[-2]) if i not in slots]
            for slot in slots:
                mask[..., others, slot] = torch.finfo(mask.dtype).min
            return mask

        # Distances between tokens count the soft columns behind the instruction, chunks those in front of it.
        chunks = any(getattr(config, "attention_chunk_size", None) for config in self._configs())
        if not before or chunks:
            with self._by_hand(hide=hide), self._layer_hooks(write):
                found = self._pass(inputs_embeds=embeds)
            if not _attention.asked >= masked_layers:
                raise NoRoadError("no attention function whose mask could be edited")
            self.roads.add("attention mask")
            return found
        # Layer by layer: what stands in front of the next one, from a pass with or without soft columns.
        text = [i for i in range(embeds.shape[1]) if i not in slots]
        states = self._inputs_of(0, inputs_embeds=embeds)[1][0]
        for layer in range(last + 1):
            with_soft = layer not in masked_layers
            shown = slice(None) if with_soft else text

            def put(
                index: int, hidden: Tensor, at: int = layer, columns: Any = shown, known: Tensor = states
            ) -> Tensor:
                return (
                    write(index, known)
                    if index == at and columns == slice(None)
                    else (known[:, columns] if index == at else hidden)
                )

            inputs = embeds[:, shown]
            moved = {} if with_soft else self._moved(slots, inputs)
            found, seen = self._inputs_of(layer + 1, put, inputs_embeds=inputs, **moved)
            if layer < last:
                states = states.clone()
                states[:, shown] = seen[layer + 1]
        self.roads.add("layer by layer")
        return found

    def _inputs_of(
        self, layer: int, put: Callable[[int, Tensor], Tensor] | None = None, **inputs: Any
    ) -> tuple[tuple[Tensor, Any], dict[int, Tensor]]:
        """A pass, and the input of a layer in it."""
        seen: dict[int, Tensor] = {}

        def look(index: int, hidden: Tensor) -> Tensor:
            seen[index] = hidden
            return hidden if put is None else put(index, hidden)

        with self._layer_hooks(look):
            found = self._pass(**inputs)
        return found, seen

    def _moved(self, slots: list[int], inputs: Tensor) -> dict[str, Tensor]:
        """Positions count the soft columns, where a model is told about positions."""
        if "position_ids" not in self._arguments():
            return {}
        return {"position_ids": torch.arange(len(slots), len(slots) + inputs.shape[1])[None]}

    @contextmanager
    def _by_hand(self, edit: Edit | None = None, hide: Any = None) -> Iterator[None]:
        was = [(c, c._attn_implementation) for c in self._configs()]
        for config, _ in was:
            config._attn_implementation_internal = NAME
        _attention.edit, _attention.hide, _attention.asked = edit, hide, set()
        try:
            yield
        except NoRoadError:
            raise
        finally:
            for config, implementation in was:
                config._attn_implementation_internal = implementation
            _attention.edit = _attention.hide = None

    def _configs(self) -> list[Any]:
        found = {id(m.config): m.config for m in self.lm.modules() if hasattr(getattr(m, "config", None), "model_type")}
        return list(found.values())

    @contextmanager
    def _layer_hooks(self, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        def hook(index: int) -> Callable[..., Any]:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if args:
                    return (change(index, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": change(index, kwargs["hidden_states"])}

            return before

        handles = [m.register_forward_pre_hook(hook(i), with_kwargs=True) for i, m in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _part_hooks(self, parts: tuple[str, ...], scales: dict[tuple[int, str], Tensor]) -> Iterator[None]:
        def hook(place: tuple[int, str], columns: Tensor | None) -> Callable[..., Any]:
            def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                factor = torch.ones(output.shape[-1])
                factor[slice(None) if columns is None else columns] = scales[place][0]
                return output * factor

            return after

        handles = []
        for index, layer in enumerate(self.layers):
            for part in parts:
                module, columns, _ = part_of(layer, part)
                handles.append(module.register_forward_hook(hook((index, part), columns)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
