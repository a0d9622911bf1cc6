"""What the method `peft` adds to peft's layers: frozen starts, and float32 tensors in a half precision backbone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class Start(nn.Module):
    """A layer's frozen start: down (r, in) and up (out, r), float32."""

    down: Tensor
    up: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.scaling: float = layer.scaling["default"]
        self.register_buffer("down", layer.lora_A["default"].weight.detach().float().clone())
        self.register_buffer("up", layer.lora_B["default"].weight.detach().float().clone())

    def subtract(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A forward hook: output - s B0 A0 x."""
        if layer.disable_adapters:
            return None
        x = args[0].to(self.down.dtype)
        return output - (self.scaling * F.linear(F.linear(x, self.down), self.up)).to(output.dtype)


def compute_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Let float32 modules inside `module` take and give `dtype`; kernels refuse the mixture, or pass it on."""

    def cast(tensors: Any, to: torch.dtype) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(to) if t.is_floating_point() else t, tensors)

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return cast(args, torch.float32), cast(kwargs, torch.float32)

    for part in module.modules():
        if any(True for _ in part.parameters(recurse=False)):
            part.register_forward_pre_hook(before, with_kwargs=True)
            part.register_forward_hook(lambda module, args, output: cast(output, dtype))


def compute_under_autocast(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a module with float32 parameters among half precision ones mix them, whatever the caller's context."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(module.parameters()).device.type, dtype):
            return inner(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
