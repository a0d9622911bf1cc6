"""Which parts of a backbone a text's gradient passes through: the others cannot be trained on texts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from iapt.config.errors import UserError
from iapt.model.architecture import arguments_of


def reached(lm: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of the modules that a text's gradient passes through, in their order.

    Left out are what no text runs through (an image encoder), what a layer reads instead of calling (Jamba's and
    Doge's `dt_proj`), and what only selects (DeepSeek-V3.2's indexer): tensors put there would never be trained. Seen
    in a pass over two tokens and back to its activations; a layer's experts count together, since two tokens do not
    reach all of them.

    Args:
        lm: a frozen model; on the meta device too.
        names: of modules; one whose output is no tensor is left out too.

    Raises:
        UserError: if the model takes no cache of transformers' own.
    """
    names = list(names)
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            outputs.setdefault(_kind(name), []).append(output)

    hooks = [lm.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
    try:
        with torch.enable_grad():
            ids = torch.arange(2, device=lm.device)[None]
            embeds = lm.get_input_embeddings()(ids).detach().requires_grad_() * 1  # some scale their input in place
            # With a cache, even if nobody reads it: without one transformers looks at values to find a text's ends, and
            # the meta device has none.
            cache = {arguments_of(lm).cache: DynamicCache(config=lm.config)}
            loss = lm(inputs_embeds=embeds, **cache).logits.float().sum()
            kinds = [(kind, output) for kind, found in outputs.items() for output in found]
            if not kinds:
                return []
            gradients = torch.autograd.grad(loss, [output for _, output in kinds], allow_unused=True)
    except ValueError as error:
        said = " ".join(str(error).split())
        raise UserError(f"backbone: {type(lm).__name__} does not run with transformers' own cache: {said}") from error
    except (RuntimeError, NotImplementedError):
        if lm.device.type != "meta":
            raise
        return names  # some kernels of experts have no form without data
    finally:
        for hook in hooks:
            hook.remove()
    alive = {kind for (kind, _), gradient in zip(kinds, gradients, strict=True) if gradient is not None}
    return [name for name in names if _kind(name) in alive]


def _kind(name: str) -> str:
    return re.sub(r"\bexperts\.\d+", "experts", name)
