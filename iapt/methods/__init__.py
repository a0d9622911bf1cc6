"""Every method, found by looking: a module in this folder that calls `register` is a method.

A *prompt-space* method is an `nn.Module` that answers which soft tokens a layer sees (`SoftPrompt`). A
*weight-space* method changes the backbone's modules (`WeightMethod`). Nothing outside this folder knows a
method by its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from iapt.backbone import Backbone


@dataclass
class MethodConfig:
    """What every method's schema starts with."""

    name: str = "???"
    # Soft prompts need rates that would ruin LoRA and the other way round, so there is no shared default.
    learning_rate: float = field(default=1e-3, metadata={"minimum": 0})

    def problems(self) -> list[str]:
        """Contradictions between this method's own fields, one line each."""
        return []


class Method(nn.Module):
    """What the two kinds of method have in common.

    Attributes:
        own_rates: learning rates for parameters whose saved name starts with the key; these form groups of
            their own, without weight decay and with their own gradient clip.
    """

    own_rates: dict[str, float]

    def __init__(self) -> None:
        super().__init__()
        self.own_rates = {}

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained tensors under the names they are saved by."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


class SoftPrompt(Method):
    """A prompt-space method: which soft tokens does layer l see, given that layer's instruction states?

    Attributes:
        num_soft_tokens: s, the columns the engine reserves.
        position: `before_instruction` ([P, instruction, response]) or `after_instruction`
            ([instruction[:-1], P, instruction[-1], response]).
        reads: what `forward` is handed as states: `layers`, each layer's input states of the instruction;
            `encoding`, the bare backbone's last hidden states at every layer (S-IDPG's separate frozen
            pass); `nothing`, when it never looks at them.
    """

    num_soft_tokens: int
    position: str
    reads: str = "layers"

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor | None:
        """The soft tokens that go into decoder layer `layer`.

        Args:
            layer: 0-based index of the decoder layer about to run.
            states: (B, N, d) hidden states of the instruction's tokens right before that layer.
            mask: (B, N) bool, False on padding.
            previous: (B, s, d) what stands at the soft positions now: at layer 0 zeros, plus the position
                embedding in models that add one; afterwards the output of the layer below.

        Returns:
            (B, s, d) in any float dtype, or None to leave `previous` as it is.
        """
        raise NotImplementedError


class WeightMethod(Method):
    """A weight-space method: trainable tensors that live inside the backbone's own modules."""

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the backbone computes exactly what it computed before the method was added."""
        raise NotImplementedError


@dataclass(frozen=True)
class MethodSpec:
    """A registered method.

    Attributes:
        config: its schema.
        build: (config, backbone) -> the module, drawing its initial values from torch's global generator.
        count: (config, backbone) -> the number of trainable parameters in closed form; reads shapes only,
            so a backbone on the meta device will do.
    """

    config: type[MethodConfig]
    build: Callable[[Any, Backbone], Method]
    count: Callable[[Any, Backbone], int]


METHODS: dict[str, MethodSpec] = {}


def register(name: str, spec: MethodSpec) -> None:
    """Make a method known as `method.name: NAME`. Raises ValueError if the name is taken."""
    if name in METHODS:
        raise ValueError(f"method {name!r} is registered twice")
    METHODS[name] = spec


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
