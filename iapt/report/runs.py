"""Run folders as they lie on disk: finished, failed, or cut short."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from iapt.config.errors import UserError
from iapt.config.fields import Role
from iapt.config.roles import with_role
from iapt.folder.files import read_config, run_folders, whole_rows
from iapt.folder.names import ACTIVATIONS, CONFIG, META, METRICS, PREDICTIONS, STATE, SUMMARY
from iapt.folder.summary import FAILED, OK, UNFINISHED, Summary, read_summary
from iapt.runs.sweep import flatten

# What runs in one cell must share: fields of a summary, and settings that a summary does not repeat.
AGREED = tuple(f.name for f in fields(Summary) if f.metadata.get("agree"))
AGREED_SETTINGS = tuple(key for key in with_role(Role.AGREE) if key not in AGREED)
VERSIONED = ("iapt", "torch", "transformers", "peft")  # packages whose version may change a result
# A summary without a `device_type` has for its `device` the machine's architecture where it computed on the CPU.
ARCHITECTURES = {"x86_64", "amd64", "aarch64", "arm64", "i386", "i686", "ppc64le", "s390x", "riscv64"}


@dataclass(eq=False)
class Run:
    """One run folder.

    Attributes:
        folder: where it lies.
        summary: what came of it.
        settings: `config.yaml`, flat: "trainer.max_steps" -> value; {} without one. An evaluation has those of the run
            that it scores, the task's aside.
    """

    folder: Path
    summary: Summary
    settings: dict[str, Any]

    @property
    def status(self) -> str:
        """`ok`, `failed` or `unfinished`."""
        return self.summary.status if self.summary.status in (OK, UNFINISHED) else FAILED

    @property
    def reason(self) -> str:
        """Why there is no result, in one line; empty for a finished run."""
        if self.status == OK:
            return ""
        if self.status == FAILED:
            return " ".join(str(self.summary.reason or "no reason recorded").split())
        resumable = "; resume=true continues it" if (self.folder / STATE).exists() else ""
        return f"no {SUMMARY}: still running or cut short, last logged step {self.last_step}{resumable}"

    @property
    def last_step(self) -> int:
        """The last step in `metrics.jsonl`, 0 if nothing was logged."""
        return int(self.log[-1]["step"]) if self.log else 0

    def name(self, key: str) -> str | None:
        """The task's, method's or backbone's name, None if the folder does not say."""
        value = getattr(self.summary, key) or self.settings.get(f"{key}.name")
        return None if value is None else str(value)

    @property
    def seed(self) -> Any:
        """The run's seed, None if the folder does not say."""
        return self.settings.get("seed") if self.summary.seed is None else self.summary.seed

    @property
    def init_from(self) -> str | None:
        """The task of the adapter that training started from, its folder where none is known; None: a fresh start."""
        record = self.summary.init_from or {}
        folder = record.get("folder") or self.settings.get("method.init_from")
        task = record.get("task") or (read_summary(Path(folder)).task if folder else None)
        return task or folder

    @property
    def checkpoint(self) -> Path | None:
        """The run folder whose adapter was scored again here (`iapt-eval`); None for a training run."""
        return Path(self.summary.checkpoint).resolve() if self.summary.checkpoint else None

    def value(self, metric: str) -> Any:
        """The test value of a metric (a fraction of 1), or the text that stands in its place; None: not scored."""
        scored = self.summary.metrics.get("test") or {}
        if metric in scored:
            return scored[metric]
        # A metric that could not be computed has a note in its place.
        return scored.get(f"{metric}_note", self.summary.test if metric == self.summary.metric else None)

    @property
    def on_cpu(self) -> bool:
        """Whether it computed without a GPU."""
        known = self.summary.device_type
        return known == "cpu" if known else (self.summary.device or "").lower() in ARCHITECTURES

    @property
    def hours(self) -> float | None:
        """Training time times processes, in hours; None if not recorded."""
        seconds = self.summary.train_seconds
        return None if seconds is None else seconds * (self.summary.num_processes or 1) / 3600

    @property
    def circumstances(self) -> dict[str, str]:
        """What runs must share to stand in one cell; what a folder does not record is left out."""
        # A summary from before some of them were in it is helped out by the folder's other files.
        beside = {
            "protocol": self.settings.get("protocol"),
            "backbone_fingerprint": (self.adapter.get("backbone") or {}).get("fingerprint"),
        }
        found = {
            **{key: self.settings.get(key) for key in AGREED_SETTINGS},
            **{key: getattr(self.summary, key) or beside.get(key) for key in AGREED},
            **{f"versions.{package}": self.summary.versions.get(package) for package in VERSIONED},
        }
        return {key: str(value) for key, value in found.items() if value is not None}

    @cached_property
    def adapter(self) -> dict[str, Any]:
        """What `adapter.json` says of method and backbone, {} without one."""
        try:
            meta = json.loads(((self.checkpoint or self.folder) / META).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return meta if isinstance(meta, dict) else {}

    @property
    def num_soft_tokens(self) -> int | None:
        """At the size that the run had, which a budget may have set; None for a method without soft tokens."""
        method = self.adapter.get("method") or {}
        value = method.get("num_soft_tokens", self.settings.get("method.num_soft_tokens"))
        return int(value) if value else None

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`; a last line cut off by a crash is left out."""
        return whole_rows(self.folder / METRICS)

    @cached_property
    def predictions(self) -> list[dict[str, Any]]:
        """The test predictions in the split's order, [] without any."""
        return whole_rows(self.folder / PREDICTIONS)

    @cached_property
    def activations(self) -> list[dict[str, Any]]:
        """One record a layer of `activations.json`, [] without one."""
        try:
            return list(json.loads((self.folder / ACTIVATIONS).read_text(encoding="utf-8"))["layers"])
        except (OSError, ValueError, KeyError, TypeError):
            return []


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Every run folder at or below `paths`, each once, in the order of their jobs.

    Raises:
        UserError: a path that is no folder, or that holds no run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(
                f"{path}: {'is a file' if path.exists() else 'no such folder'}; give a run folder, or one above"
            )
        folders = sorted({folder.resolve() for folder in run_folders(path)}, key=_by_number)
        if not folders:
            raise UserError(f"{path}: no run folder in it; one holds {CONFIG} or {SUMMARY}")
        found |= dict.fromkeys(folders)
    return [_read(folder) for folder in found]


def short(folder: Path) -> str:
    """The folder, relative to the current one where that is shorter."""
    try:
        return str(folder.relative_to(Path.cwd()))
    except ValueError:
        return str(folder)


def _read(folder: Path) -> Run:
    run = Run(folder, read_summary(folder), flatten(read_config(folder)))
    if run.checkpoint and not run.settings:
        run.settings = {k: v for k, v in flatten(read_config(run.checkpoint)).items() if not k.startswith("task.")}
    return run


def _by_number(folder: Path) -> tuple[Any, ...]:
    # Jobs of a sweep are folders 0, 1, ..., 10.
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in folder.parts)
