"""`iapt-eval`: score a checkpoint again, as its run did or on another split, task or data folder.

iapt-eval checkpoint=outputs/toy/entailment/iapt/...
iapt-eval checkpoint=RUN split=dev trainer.eval_batch_size=8
iapt-eval checkpoint=RUN harness.tasks=[mmlu_abstract_algebra]     (see iapt.benchmarks.harness)
iapt-eval checkpoint=RUN mt_bench.questions=question.jsonl         (see iapt.benchmarks.mtbench)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from iapt.cli.app import loading, run_command
from iapt.config.errors import ConfigError
from iapt.folder.summary import Summary

BENCHMARKS = ("harness", "mt_bench")  # each has a schema and a key that asks for it
OWN_KEYS = ("checkpoint", "split", *BENCHMARKS)


def main() -> None:
    """Entry point of `iapt-eval`."""
    run_command("eval", _job, _problems)


def _job(composed: DictConfig, folder: Path, in_sweep: bool) -> Summary:
    given = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(given, dict)
    loading("iapt-eval", f"checkpoint={given.get('checkpoint')}")
    from iapt.runs import experiment

    problems = _problems(composed)
    if problems:
        raise ConfigError(problems)
    settings = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(settings, dict)
    overrides = {str(k): v for k, v in settings.items() if k not in OWN_KEYS and v is not None}
    if overrides.get("data_dir"):
        overrides["data_dir"] = str(Path(overrides["data_dir"]).expanduser().absolute())
    checkpoint = Path(settings["checkpoint"]).expanduser().absolute()
    benchmarks = _benchmarks(composed)
    if benchmarks.harness.tasks:
        from iapt.benchmarks import harness

        return harness.evaluate(checkpoint, folder, overrides, benchmarks.harness)
    if benchmarks.mt_bench.questions:
        from iapt.benchmarks import mtbench

        return mtbench.evaluate(checkpoint, folder, overrides, benchmarks.mt_bench)
    return experiment.evaluate(checkpoint, folder, overrides, str(settings["split"]))


def _problems(composed: DictConfig) -> list[str]:
    """List what can be said without the checkpoint's own config; the rest is checked once that is read."""
    from iapt.methods.settings import unknown_keys

    given = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(given, dict)
    problems = unknown_keys({str(k): v for k, v in given.items() if k not in OWN_KEYS}, also=OWN_KEYS)
    if OmegaConf.is_missing(composed, "checkpoint") or not composed.checkpoint:
        problems.insert(0, "checkpoint: missing; give checkpoint=RUN_FOLDER, or the folder of an adapter")
    try:
        benchmarks = _benchmarks(composed)
    except ConfigError as error:
        return problems + error.problems
    from iapt.benchmarks import harness, mtbench

    problems += harness.problems(benchmarks.harness) + mtbench.problems(benchmarks.mt_bench)
    if benchmarks.harness.tasks and benchmarks.mt_bench.questions:
        problems.append("harness.tasks, mt_bench.questions: one benchmark at a time, each needs a folder of its own")
    return problems


def _benchmarks(composed: DictConfig) -> Any:
    """The settings of the benchmarks as dataclasses. Raises ConfigError naming what does not fit."""
    from iapt.benchmarks.harness import HarnessConfig
    from iapt.benchmarks.mtbench import MtBenchConfig
    from iapt.methods.settings import load_config

    schemas = dict(zip(BENCHMARKS, (HarnessConfig, MtBenchConfig), strict=True))
    fields = [(name, schema, dataclasses.field(default_factory=schema)) for name, schema in schemas.items()]
    given = {key: composed[key] for key in BENCHMARKS if composed.get(key) is not None}
    return load_config(OmegaConf.create(given), dataclasses.make_dataclass("Benchmarks", fields))


if __name__ == "__main__":
    main()
