"""MMLU, BBH and anything else of EleutherAI's lm-evaluation-harness on an adapted model.

iapt-eval checkpoint=RUN harness.tasks=[mmlu_abstract_algebra,bbh_zeroshot_navigate]
iapt-eval checkpoint=RUN harness.tasks=[mine] harness.include_path=my/tasks

Task definitions, prompts, few-shot examples and metrics are the harness's own (`pip install 'iapt[harness]'`). The
folder then holds harness.json (all the harness reports), harness_samples.jsonl (every example and answer) and
summary.json.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iapt.config.errors import UserError
from iapt.config.fields import at_least
from iapt.config.releases import beyond_tested
from iapt.folder.files import write_json, write_rows
from iapt.folder.names import HARNESS, HARNESS_SAMPLES
from iapt.folder.summary import OK, Summary, refuse_finished, write_summary
from iapt.runs.provenance import circumstances
from iapt.runs.restore import build_model, read_saved, refuse_bound_to_task

log = logging.getLogger(__name__)


@dataclass
class HarnessConfig:
    """The tasks of the harness to run, and how. With no `tasks` nothing is run."""

    tasks: list[str] = field(default_factory=list)  # names, groups, tags or patterns of the harness
    num_fewshot: int | None = at_least(None, 0)  # null: as each task says
    limit: float | None = at_least(None, 0)  # examples of each task, a share of them below 1; null: all
    include_path: str | None = None  # a folder with tasks of one's own
    batch_size: int | None = at_least(None, 1)  # null: trainer.eval_batch_size
    max_length: int | None = at_least(None, 2)  # tokens of context and continuation; null: what the backbone has
    gen_kwargs: dict[str, Any] = field(default_factory=dict)  # laid over every task's generation_kwargs


def problems(config: HarnessConfig) -> list[str]:
    """List what is wrong with the settings before anything is loaded, one line each."""
    found = []
    if not config.tasks:
        given = [name for name, value in vars(config).items() if value]
        return [f"harness.{name} = {getattr(config, name)!r}: does nothing without harness.tasks" for name in given]
    if config.limit == 0:
        found.append("harness.limit = 0: must be above 0; null for all examples")
    if config.include_path and not Path(config.include_path).expanduser().is_dir():
        found.append(f"harness.include_path = {config.include_path!r}: no such folder")
    if importlib.util.find_spec("lm_eval") is None:
        found.append("harness.tasks: needs the lm-evaluation-harness: pip install 'iapt[harness]'")
    return found


def evaluate(checkpoint: Path, folder: Path, overrides: dict[str, Any], config: HarnessConfig) -> Summary:
    """Run tasks of the harness on a saved adapter.

    Args:
        checkpoint: a run or adapter folder; it is only read.
        folder: where the results go; must not hold a finished run.
        overrides: nested settings laid over the run's own.
        config: which tasks, and how.

    Returns:
        A summary whose `metrics` maps every task and group to what the harness measured; `test` is the first metric of
        the one task that was asked for, null where there are several or it is no fraction of 1.

    Raises:
        UserError: an unreadable checkpoint, unknown tasks, tasks whose data cannot be loaded, a text with no room.
    """
    refuse_finished(folder)
    saved = read_saved(checkpoint, overrides)
    refuse_bound_to_task(saved)
    if said := beyond_tested("lm-eval"):
        log.warning(said)
    tasks = _load_tasks(config)
    model, accelerator = build_model(saved)
    if model.method is not None and model.method.adjusts_scores:
        raise UserError(
            f"checkpoint = {checkpoint}: method {saved.config.method.name} adjusts scores over its own task's labels, "
            "which the harness's options are not; give the checkpoint of another method"
        )
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from iapt.benchmarks.harness_model import AdaptedLM

    lm = AdaptedLM(model, config.batch_size or saved.config.trainer.eval_batch_size, config.max_length)
    start = time.perf_counter()
    found = simple_evaluate(
        lm,
        tasks=tasks,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        batch_size=lm.batch_size,
        gen_kwargs=dict(config.gen_kwargs) or None,
    )
    model.detach()
    # Task configurations hold functions and arrays.
    results = json.loads(json.dumps(found, default=handle_non_serializable))
    samples = results.pop("samples", {})
    numbers = {name: _metrics(row) for name, row in results["results"].items() if _metrics(row)}
    asked = {name: numbers[name] for name in config.tasks if name in numbers} or numbers
    firsts = {name: next(iter(row.items())) for name, row in asked.items()}
    metric, value = next(iter(firsts.values())) if len(firsts) == 1 else (None, None)
    notes = [f"{name} {key} {value:.4f}" for name, (key, value) in firsts.items()]
    for note in lm.notes():
        log.warning(note)
    shots = results.get("n-shot")
    summary = Summary(
        task="harness/" + (config.tasks[0] if len(config.tasks) == 1 else f"{len(config.tasks)} tasks"),
        **saved.identity(),
        metric=metric,
        test=value if value is not None and 0 <= value <= 1 else None,
        metrics={"test": numbers},
        harness={"n_shot": shots, "limit": config.limit, "n_samples": results.get("n-samples"), "cut": lm.cut},
        data_fingerprint=_fingerprint([results.get(key) for key in ("task_hashes", "versions")], shots, samples),
        note="; ".join([*notes, *lm.notes()]),
        preflight=model.preflight,
        status=OK,
        eval_seconds=round(time.perf_counter() - start, 3),
        **circumstances(accelerator),
    )
    summary.versions["lm_eval"] = importlib.metadata.version("lm_eval")
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / HARNESS_SAMPLES, ({"task": name, **r} for name, records in samples.items() for r in records))
    write_json(folder / HARNESS, results)
    write_summary(folder, summary)
    return summary


def _load_tasks(config: HarnessConfig) -> list[Any]:
    """The harness's task and group objects, loaded before the backbone is: a mistyped name must not wait for it."""
    import datasets
    from lm_eval.tasks import TaskManager

    # Every task logs its template; what matters of that is in harness.json.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    path = config.include_path
    manager = TaskManager(include_path=str(Path(path).expanduser().absolute()) if path else None)
    unknown = [name for name in config.tasks if not manager.match_tasks([name])]
    if unknown:
        near = {name: difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5) for name in unknown}
        words = [f"{name}" + (f" (did you mean {', '.join(close)}?)" if close else "") for name, close in near.items()]
        raise UserError(
            f"harness.tasks: not known: {'; '.join(words)}; `lm-eval ls tasks` lists the {len(manager.all_tasks)} that "
            "are, harness.include_path=FOLDER adds your own"
        )
    names = manager.match_tasks(list(config.tasks))
    try:
        loaded = manager.load(names)
    except (OSError, ValueError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"harness.tasks = {config.tasks}: could not be loaded: {reason}") from error
    unsafe = sorted(name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False))
    if unsafe:
        raise UserError(f"harness.tasks: {', '.join(unsafe)} run code that a model wrote, which is not done here")
    groups = [loaded["groups"][name] for name in names if name in loaded["groups"]]
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    return groups + [task for name, task in loaded["tasks"].items() if name not in inside]


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """A row of the harness's results without standard errors and names: `acc,none` -> value."""
    values = {k: v for k, v in row.items() if "," in k and "_stderr," not in k and isinstance(v, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in values.items()}


def _fingerprint(parts: list[Any], shots: Any, samples: dict[str, list[dict[str, Any]]]) -> str:
    """Hash the tasks' definitions and the very prompts: results that differ here are not of the same thing."""
    prompts = {name: [r.get("prompt_hash") for r in records] for name, records in samples.items()}
    text = json.dumps([*parts, shots, prompts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
