"""The schema of a run: one dataclass per config group, plain data without OmegaConf in it.

`iapt.config.check` fills it from what Hydra composed. A method's own schema lives beside the method (`iapt.methods`).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from iapt.config.fields import COSMETIC, Role, at_least, choice, setting
from iapt.config.method import MethodConfig
from iapt.config.task import PROTOCOLS, TaskConfig

BUDGET = re.compile(r"(?=.*[1-9])(\d+(?:\.\d+)?)\s*([kmb%]?)", re.IGNORECASE)
BUDGET_FORM = "a number of parameters such as 20M, 300k or 1500, or a share of the backbone's such as 0.3%"


@dataclass
class BackboneConfig:
    """The frozen language model."""

    name: str = "tiny"  # what tables call it
    # pretrained: a folder or hub id; random: weights drawn for a shape; tiny: the one in the package
    kind: str = choice("tiny", "pretrained", "random", "tiny")
    path: str | None = None  # hub id or local folder; `kind: pretrained` needs one
    revision: str | None = None  # branch, tag or commit on the hub
    dtype: str = choice("auto", "auto", "float32", "bfloat16")  # auto: what hardware.precision asks for
    quantization: str = choice(
        "none", "none", "nf4", "int8", role=Role.IDENTITY | Role.ROW
    )  # needs the extra `iapt[quantized]`
    # kind: random: keyword arguments of transformers' AutoConfig.for_model, `model_type` among them
    shape: dict[str, Any] = field(default_factory=dict)


@dataclass
class HardwareConfig:
    """Where and how a run computes."""

    # auto: the GPU if there is one
    device: str = choice("auto", "auto", "cpu", "cuda", role=Role.IDENTITY | Role.MAY_DIFFER)
    num_processes: int = at_least(1, 1)  # they share every batch; on GPUs one process each
    strategy: str = choice("ddp", "ddp", "fsdp")  # fsdp shards the frozen backbone; adapters stay replicated
    precision: str = choice("fp32", "fp32", "bf16")
    gradient_accumulation: int = at_least(1, 1)  # parts that a batch is computed in
    activation_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    attention: str = choice("auto", "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3")


@dataclass
class TrainerConfig:
    """The protocol; defaults are the series' (label S, docs/methods.md) where a source states one."""

    max_steps: int | None = at_least(None, 1)  # null: `epochs` decides
    epochs: int = at_least(10, 1)  # passes over train, where max_steps is null
    batch_size: int | None = at_least(None, 1)  # global; null: 16 below 10k training examples, else 128
    # examples at a time when scoring and decoding
    eval_batch_size: int = at_least(64, 1, role=Role.IDENTITY | Role.MAY_DIFFER | Role.ROW)
    learning_rate: float | None = at_least(None, 0)  # null: the method's own
    weight_decay: float = at_least(0.0, 0)  # of AdamW
    warmup_ratio: float = at_least(0.06, 0)  # share of the steps in which the learning rate rises from 0
    max_grad_norm: float = at_least(1.0, 0)  # longer gradients are scaled down to it
    eval_every: int = at_least(200, 1)
    patience: int = at_least(10, 1)  # evaluations without a better dev loss before the run stops
    max_length: int = at_least(768, 8)  # instruction tokens; longer ones lose their beginning, with a word
    max_response_length: int = at_least(256, 1)  # response tokens; longer ones lose their end
    group_by_length: bool = False
    log_every: int = at_least(10, 1, role=COSMETIC)  # steps between two lines of the log


@dataclass
class TrackingConfig:
    """Who else is told. metrics.jsonl is always written."""

    name: str = choice("none", "none", "wandb")  # the tracker
    project: str = "iapt"  # on Weights & Biases
    entity: str | None = None  # user or team; null: your default one
    mode: str = choice("online", "online", "offline", "disabled")
    group: str | None = None  # runs that are shown together
    tags: list[str] = field(default_factory=list)  # words to find the run by


@dataclass
class SweepConfig:
    """What a sweep does with cells that an earlier start of it left in its directory."""

    retry: str = choice("none", "none", "failed")  # finished cells are skipped, interrupted ones continued, always


@dataclass
class Config:
    """One run."""

    seed: int = 1
    data_dir: str | None = setting(None, Role.ELSEWHERE)
    resume: bool = setting(False, COSMETIC)
    zero_shot: bool = True  # also score the bare backbone, for the table
    # Which rows choose and which are reported. strict: dev is carved from train, all labelled rows that are not train
    # are test. paper: the series' splits (S), for small data sets half of validation each for dev and test.
    protocol: str = choice("strict", *PROTOCOLS, role=Role.IDENTITY | Role.AGREE)
    # a probe of the very model before it runs; see `iapt.preflight`
    preflight: str = choice("auto", "auto", "off", role=COSMETIC)
    # trainable parameters, 20M or 0.3% (of the backbone's); sets the method's size
    budget: str | None = setting(None, Role.IDENTITY | Role.ROW, numbers=True)
    # A report knows a backbone by its name and weights, a task by its name, examples and template.
    backbone: BackboneConfig = field(default_factory=BackboneConfig, metadata={"role": Role.IDENTITY})
    task: TaskConfig = field(default_factory=TaskConfig, metadata={"role": Role.IDENTITY})
    method: MethodConfig = field(default_factory=MethodConfig, metadata={"role": Role.IDENTITY | Role.ROW})
    # Part of the identity: a sweep over it is an experiment on speed and memory, and its cells must stay apart.
    hardware: HardwareConfig = field(
        default_factory=HardwareConfig, metadata={"role": Role.IDENTITY | Role.MAY_DIFFER | Role.ROW}
    )
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata={"role": COSMETIC})
    trainer: TrainerConfig = field(default_factory=TrainerConfig, metadata={"role": Role.IDENTITY | Role.ROW})
    sweep: SweepConfig = field(default_factory=SweepConfig, metadata={"role": COSMETIC})

    def __post_init__(self) -> None:
        if self.trainer.learning_rate is None:
            self.trainer = dataclasses.replace(self.trainer, learning_rate=self.method.learning_rate)


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain containers, ready for YAML or JSON."""
    return dataclasses.asdict(config)
