"""Rows to probe with, noise, a distance between logits, and a way to leave everything as it was."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from iapt.data.batch import Batch, Encoded, collate
from iapt.model.adapted import AdaptedModel
from iapt.model.method import SoftPrompt

LENGTHS = ((6, 4), (2, 3))  # tokens of instruction and response of each row; two are the fewest that a run allows
SPARE = 3  # columns of padding that a check adds
FLOOR = -1e4  # logits below it are not predictions but masks, as of the tokens that stand for pictures


def distance(found: Tensor, wanted: Tensor, mask: Tensor) -> float:
    """Measure how far two (B, R, V) logits are apart, see `iapt.preflight`; mask (B, R) bool says at which positions.

    NaN if one of them is not finite, except where both are masks.
    """
    a, b = found[mask].double(), wanted[mask].double()
    seen = ~((a < FLOOR) & (b < FLOOR))
    spread, apart = _spread(b, seen), _spread(a - b, seen)
    return float((apart / spread.clamp(min=torch.finfo(torch.float32).tiny)).max())


def _spread(values: Tensor, seen: Tensor) -> Tensor:
    """Standard deviations (n,) over the last dimension of what is seen (n, V)."""
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    centred = values.where(seen, 0)
    centred = (centred - centred.sum(-1, keepdim=True) / count).where(seen, 0)
    return (centred.square().sum(-1, keepdim=True) / count).sqrt()[:, 0]


def no_room(model: AdaptedModel) -> str | None:
    """Why the probe does not fit into the backbone's context, None if it does."""
    soft = model.method.num_soft_tokens if isinstance(model.method, SoftPrompt) else 0
    needed = soft + max(map(sum, LENGTHS)) + SPARE
    context = model.backbone.context
    if context is not None and needed > context:
        return f"(the probe takes {needed} positions, the context has {context})"
    return None


def rows(model: AdaptedModel) -> Batch:
    """Two rows of ordinary tokens, drawn by a generator of their own, on the model's device."""
    backbone, tokenizer = model.backbone, model.backbone.tokenizer
    size, special = backbone.embeddings.weight.shape[0], {backbone.pad_id}
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        special |= {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        size = min(size, len(tokenizer))
    for config in (model.lm.config, model.lm.config.get_text_config()):
        # Pictures and sounds stand behind ids of their own.
        for key, value in config.to_dict().items():
            if key.endswith(("_token_id", "_token_index")):
                special |= set(value if isinstance(value, list | tuple) else [value])
    ordinary = [i for i in range(size) if i not in special] or list(range(size))
    generator = torch.Generator().manual_seed(0)
    wanted = [i for m in model.modules() for i in _own_tokens(m)]  # tensors that hang on single tokens
    order = itertools.cycle(torch.randperm(len(ordinary), generator=generator)[: sum(map(sum, LENGTHS))].tolist())
    rows = []
    for index, lengths in enumerate(LENGTHS):
        drawn = [ordinary[next(order)] for _ in range(sum(lengths))]  # no token twice, if there are enough
        if index == 0:
            drawn[1 : 1 + len(wanted[:4])] = wanted[:4]
        rows.append(Encoded(index, tuple(drawn[: lengths[0]]), tuple(drawn[lengths[0] :]), ()))
    return collate(rows, backbone.pad_id).to(model.lm.device)


def _own_tokens(module: nn.Module) -> list[int]:
    """The ids for which peft's layer at an embedding table has rows of its own."""
    ids = getattr(module, "token_indices", None)
    return [int(i) for one in ids.values() for i in one] if isinstance(ids, dict) else []


def move(tensors: dict[str, nn.Parameter], starts: dict[str, Tensor], size: float, seed: int) -> None:
    """Put each a little off its start, by a tenth of its own size times `size`; what is zero gets small numbers.

    Always from the start: moved again and again, what feeds a softmax or a sigmoid would drive it to its end, where
    gradients are zero.
    """
    for index, (name, parameter) in enumerate(tensors.items()):
        generator = torch.Generator(parameter.device).manual_seed(1000 * seed + index)
        start = starts[name].to(parameter.device)
        scale = float(start.float().square().mean().sqrt())
        noise = torch.randn(start.shape, generator=generator, device=start.device)
        parameter.copy_(start + (noise * size * (0.1 * scale or 0.02)).to(start.dtype))


@contextmanager
def rounding_errors(layers: Iterable[nn.Module], size: float) -> Iterator[None]:
    """A context in which every layer's input has relative errors of this standard deviation, new ones in each pass."""
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(layer: nn.Module, args: Any, kwargs: Any) -> Any:
        states = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(states, Tensor):
            return None
        generator = generators.setdefault(states.device, torch.Generator(states.device).manual_seed(0))
        errors = torch.randn(states.shape, generator=generator, device=states.device)
        states = (states * (1 + size * errors)).to(states.dtype)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    hooks = [layer.register_forward_pre_hook(disturb, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def unreached(loss: Tensor, asked: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those without a gradient other than zero."""
    if not asked or not loss.requires_grad:
        return asked
    # Not by backward(): what stands in .grad is the caller's.
    found = torch.autograd.grad(loss, list(asked.values()), allow_unused=True)
    return {
        name: parameter
        for (name, parameter), gradient in zip(asked.items(), found, strict=True)
        if gradient is None or not gradient.any()
    }


@contextmanager
def undisturbed(model: AdaptedModel) -> Iterator[dict[str, Tensor]]:
    """A context at whose end the model and all random numbers are as they were; gives copies of what is trained."""
    engine = model.engine
    was = engine.training, engine.hooks.recompute, engine.one_pass
    modes = [(module, module.training) for module in model.modules()]
    kept = {name: p.detach().to("cpu", copy=True) for name, p in model.trainable().items()}
    states = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.lm.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)):
            yield kept
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        with torch.no_grad():
            for name, parameter in model.trainable().items():
                parameter.copy_(kept[name])
        for module, mode in modes:
            module.training = mode
        engine.training, engine.hooks.recompute, engine.one_pass = was
