"""What every method's settings start with. A method's own schema stands beside the method, in `iapt.methods`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from iapt.config.fields import Role, at_least, setting
from iapt.config.task import TaskConfig


@dataclass(frozen=True)
class SizeKnob:
    """The setting that decides how many parameters a method trains.

    Attributes:
        field: its name; `options.r` reaches into a mapping.
        step: allowed values are the multiples of it.
    """

    field: str
    step: int = 1


@dataclass
class MethodConfig:
    """The settings that every method has.

    One registered method may appear in several configs under names of their own. Most schemas have a learning rate of
    their own, because soft prompts need rates that would ruin LoRA and the other way round.
    """

    trains_backbone: ClassVar[bool] = False  # True: nothing of the backbone stays frozen
    bound_to_task: ClassVar[bool] = False  # True: what it has learned are this task's labels

    name: str = setting("???", Role.IDENTITY)  # what tables call it
    kind: str | None = setting(None, Role.IDENTITY)  # the registered method; null: `name`
    learning_rate: float = at_least(1e-3, 0, Role.IDENTITY)  # of AdamW, unless trainer.learning_rate is set

    def problems(self) -> list[str]:
        """Contradictions between this method's own fields, one line each."""
        return []

    def problems_with(self, task: TaskConfig) -> list[str]:
        """Contradictions between this method and a task, one line each."""
        return []

    def size_knob(self) -> SizeKnob | None:
        """Return the setting that `budget` may set; None if the backbone alone decides the number
        of trained parameters.
        """
        return None

    def adapters(self) -> dict[str, str | None]:
        """The settings that name a run or adapter folder, and what they say."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("adapter")}


@dataclass
class SoftPromptConfig(MethodConfig):
    """The settings that every prompt-space method has.

    `init_from` is the folder of a run, or of an adapter, that training starts from: soft prompt transfer (SPoT, Vu et
    al., ACL 2022; PoT, Su et al., NAACL 2022). It is of the same method, size and backbone; `post` leads from one
    backbone to another.
    """

    init_from: str | None = setting(None, adapter=True)
