"""The content of `summary.json`: one typed record for runs, evaluations and benchmarks, finished or failed."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iapt.config.errors import UserError
from iapt.folder.files import write_json
from iapt.folder.names import SUMMARY

SCHEMA_VERSION = 1
OK, FAILED = "ok", "failed"
# These two are never written: a folder whose run has not ended has no summary.
UNFINISHED, RUNNING, INTERRUPTED = "unfinished", "running", "interrupted"


def agree() -> Any:
    """A field that the runs of one cell of a table must agree in, because another value is another experiment."""
    return field(default=None, metadata={"agree": True})


@dataclass
class Summary:
    """What came of a run or an evaluation; null is what it has nothing to say about.

    Scores are fractions of 1. Files from before `schema_version` lack it, and some of the other keys.

    Attributes:
        status: `ok`, `failed`; a folder without a summary reads as `unfinished`.
        reason: why it failed; `exit_code` is the command line's then.
        trainable_params: how many parameters the method trains.
        metric: the one that `zero_shot`, `dev` and `test` are of; `metrics` has all of them by split.
        budget: what the budget came to.
        init_from: the adapter that training started from.
        checkpoint: the folder whose adapter was scored here; null for a training run.
        split: the one that an evaluation scored.
        majority: share of test's commonest label.
        preflight: what the probe of the model found.
        harness, mt_bench: what these benchmarks say besides.
        note: why the value is what it is, where anyone would ask.
        device: the GPU's name, or the machine's architecture where the run computed on the CPU; `device_type` is
            torch's word for it, cpu or cuda.
        git: the commit of the checkout.
    """

    schema_version: int = SCHEMA_VERSION
    task: str | None = None
    method: str | None = None
    backbone: str | None = None
    seed: int | None = None
    trainable_params: int | None = None
    protocol: str | None = agree()
    metric: str | None = agree()
    data_fingerprint: str | None = agree()
    template_hash: str | None = agree()
    backbone_fingerprint: str | None = agree()
    budget: dict[str, Any] | None = None
    init_from: dict[str, Any] | None = None
    checkpoint: str | None = None
    split: str | None = None
    zero_shot: float | None = None
    dev: float | None = None
    test: float | None = None
    majority: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    best_dev_loss: float | None = None
    steps: int | None = None
    total_steps: int | None = None
    batch_size: int | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    eval_seconds: float | None = None
    preflight: dict[str, Any] | None = None
    harness: dict[str, Any] | None = None
    mt_bench: dict[str, Any] | None = None
    note: str | None = None
    status: str = UNFINISHED
    reason: str | None = None
    exit_code: int | None = None
    peak_memory_bytes: int | None = None
    device: str | None = None
    device_type: str | None = None
    num_processes: int | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    git: str | None = None

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return self.status == OK


def read_summary(folder: Path) -> Summary:
    """The folder's summary; one with status `unfinished` if there is none or it cannot be read.

    A key that is not known, or whose value is of another type than its field, is left out.
    """
    try:
        content = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Summary()
    if not isinstance(content, dict):
        return Summary()
    told: dict[str, Any] = {"schema_version": 0, "status": FAILED}
    for key, hint in typing.get_type_hints(Summary).items():
        if key in content and _fits(content[key], hint):
            told[key] = content[key]
    return Summary(**told)


def write_summary(folder: Path, summary: Summary) -> None:
    """Write `summary.json`; the folder is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SUMMARY, dataclasses.asdict(summary))


def names_in(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Summary` that a configuration, however broken, tells: what was run."""
    groups = {key: config.get(key) for key in ("task", "method", "backbone")}
    named = {key: group.get("name") if isinstance(group, dict) else None for key, group in groups.items()}
    return {**named, "seed": config.get("seed")}


def refuse_finished(folder: Path, key: str = "hydra.run.dir") -> None:
    """Raises UserError if the folder, which the setting `key` names, holds a finished run."""
    if read_summary(folder).finished:
        raise UserError(f"{key} = {folder}: already holds a finished run; nothing was changed, choose another")


def _fits(value: Any, hint: Any) -> bool:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        return True
    return type(value) in {typing.get_origin(kind) or kind for kind in kinds}
