"""MT-Bench (Zheng et al., NeurIPS 2023, arXiv 2306.05685): two-turn answers of an adapted model, graded by a judge.

iapt-eval checkpoint=RUN mt_bench.questions=question.jsonl hydra.run.dir=outputs/mt
iapt-eval checkpoint=RUN mt_bench.questions=question.jsonl hydra.run.dir=outputs/mt \\
    mt_bench.judge.base_url=https://HOST/v1 mt_bench.judge.model=NAME

The first line writes the answers, the second has them graded (both in one line works too). Files are FastChat's:

    question.jsonl    question_id, category, turns [first, second]
    answers.jsonl     question_id, answer_id, model_id, choices [{index, turns}], tstamp
    judgments.jsonl   question_id, model, judge, user_prompt, judgment, score, turn, tstamp
    mt_bench.json     what the answers were made from; a folder never mixes two of these

Lines are added as they come, so the same command in the same folder goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from iapt.benchmarks import judge
from iapt.benchmarks.judge import JudgeConfig, Question
from iapt.benchmarks.mtbench_answers import Answerer, Layout
from iapt.config.errors import UserError
from iapt.config.fields import at_least
from iapt.config.schema import to_dict
from iapt.folder.files import append_row, read_rows, write_json
from iapt.folder.names import ADAPTER, ANSWERS, JUDGMENTS, MT_BENCH
from iapt.folder.summary import OK, Summary, read_summary, refuse_finished, write_summary
from iapt.model.adapted import AdaptedModel
from iapt.runs.provenance import circumstances
from iapt.runs.restore import Saved, build_model, read_saved, refuse_bound_to_task

log = logging.getLogger(__name__)


@dataclass
class MtBenchConfig:
    """The questions, and how they are answered. With `questions` null nothing is run."""

    questions: str | None = None  # FastChat's question.jsonl
    column: str | None = None  # of the task's template that takes a question; null: its only one, or `instruction`
    joiner: str = "\n\n"  # between the first turn's answer and the second turn's instruction
    max_new_tokens: int = at_least(1024, 1)
    batch_size: int | None = at_least(None, 1)  # null: trainer.eval_batch_size
    temperatures: dict[str, float] = field(default_factory=dict)  # category -> temperature; others decode greedily
    model_id: str | None = None  # null: backbone-method-seed
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def problems(config: MtBenchConfig) -> list[str]:
    """List what is wrong with the settings before anything is loaded, one line each."""
    if config.questions is None:
        default = MtBenchConfig()
        given = [name for name, value in vars(config).items() if value != getattr(default, name)]
        return [f"mt_bench.{name}: does nothing without mt_bench.questions" for name in given]
    found = [
        f"mt_bench.temperatures.{category} = {value}: must be at least 0"
        for category, value in config.temperatures.items()
        if value < 0
    ]
    return found + judge.problems(config.judge)


def evaluate(checkpoint: Path, folder: Path, overrides: dict[str, Any], config: MtBenchConfig) -> Summary:
    """Answer the questions that have no answer yet and, with a judge, grade what has no grade yet.

    Args:
        checkpoint: a run or adapter folder; it is only read.
        folder: a new folder, or one of the same checkpoint, questions and settings to go on in.
        overrides: nested settings laid over the run's own.
        config: questions and judge.

    Returns:
        A summary whose `test` is the mean rating divided by 10, null without a judge.

    Raises:
        UserError: bad questions, another benchmark's folder, a template that no question fits into, a judge that
            refuses the key or the model.
        TrainingError: a judge that graded nothing.
    """
    if read_summary(folder).mt_bench is None:
        refuse_finished(folder)
    assert config.questions is not None
    source = Path(config.questions).expanduser()
    questions = read_questions(source)
    references = judge.read_references(config.judge.references)
    saved = read_saved(checkpoint, overrides)
    refuse_bound_to_task(saved)
    layout = Layout(saved.config.task, config.column, config.joiner)
    identity = _identity(saved, config, layout, source)
    _check_folder(folder, identity)
    answers = {row["question_id"]: row for row in read_rows(folder / ANSWERS)}
    missing = [q for q in questions if q.id not in answers]
    start, notes = time.perf_counter(), list[str]()
    model: AdaptedModel | None = None
    if missing:
        model, accelerator = build_model(saved)
        answerer = Answerer(model, layout, config.max_new_tokens, saved.config.seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MT_BENCH, identity)
        size = config.batch_size or saved.config.trainer.eval_batch_size
        for temperature, batch in _batches(missing, config, size):
            for question, turns in zip(batch, answerer(batch, temperature), strict=True):
                answers[question.id] = _answer(question, turns, identity["model_id"])
                append_row(folder / ANSWERS, answers[question.id])
            log.info("mt_bench: %d of %d questions answered", len(answers), len(questions))
        notes += answerer.notes()
        model.detach()
    else:
        accelerator = Accelerator(cpu=saved.config.hardware.device == "cpu")
    said = {number: row["choices"][0]["turns"] for number, row in answers.items()}
    grades: dict[str, Any] = {}
    if config.judge.base_url:
        failures = judge.grade(questions, said, references, config.judge, identity["model_id"], folder / JUDGMENTS)
        grades = judge.summarise(questions, read_rows(folder / JUDGMENTS), config.judge.model, failures)
        judge.refuse_nothing(grades)
        if failures:
            notes.append(f"{len(failures)} of {2 * len(questions)} judgments failed; the same command retries them")
    summary = Summary(
        task="mt_bench",
        **saved.identity(),
        metric="rating/10",
        test=grades["mean"] / 10 if grades else None,
        metrics={"test": {"rating": grades["mean"]} if grades else {}},
        mt_bench={"questions": len(questions), "model_id": identity["model_id"], "grades": grades or None},
        data_fingerprint=identity["questions"],
        template_hash=identity["layout"],
        note="; ".join([*notes, *([] if grades else [f"{len(answers)} answers, no judge yet"])]) or None,
        preflight=model.preflight if model else None,
        status=OK,
        eval_seconds=round(time.perf_counter() - start, 3),
        **circumstances(accelerator),
    )
    write_summary(folder, summary)
    return summary


def read_questions(path: Path) -> list[Question]:
    """FastChat's question file.

    Raises:
        UserError: a file that cannot be read, a row without id, category and two turns, an id that comes twice.
    """
    where = f"mt_bench.questions = {str(path)!r}"
    if not path.is_file():
        raise UserError(f"{where}: no such file; FastChat's question.jsonl is expected")
    questions: dict[Any, Question] = {}
    for number, row in enumerate(read_rows(path, whole=True), 1):
        turns, key = row.get("turns"), row.get("question_id")
        fits = isinstance(turns, list) and len(turns) == 2 and all(isinstance(t, str) and t.strip() for t in turns)
        if not fits or key is None or not row.get("category"):
            raise UserError(f"{where}: row {number} needs question_id, category and turns, a list of two texts")
        if key in questions:
            raise UserError(f"{where}: question_id {key} comes twice, in row {number} again")
        assert isinstance(turns, list)
        questions[key] = Question(key, str(row["category"]), (turns[0], turns[1]))
    if not questions:
        raise UserError(f"{where}: is empty")
    return list(questions.values())


def _batches(questions: list[Question], config: MtBenchConfig, size: int) -> Iterator[tuple[float, list[Question]]]:
    """(temperature, questions) in the questions' order."""
    groups: dict[float, list[Question]] = defaultdict(list)
    for question in questions:
        groups[config.temperatures.get(question.category, 0.0)].append(question)
    for temperature, members in groups.items():
        yield from ((temperature, members[i : i + size]) for i in range(0, len(members), size))


def _answer(question: Question, turns: tuple[str, str], model_id: str) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time.time(),
    }


def _identity(saved: Saved, config: MtBenchConfig, layout: Layout, questions: Path) -> dict[str, Any]:
    """Return what decides the answers; a folder holds answers of one such thing."""
    named = saved.config
    identity = {
        "model_id": config.model_id or f"{named.backbone.name}-{named.method.name}-{named.seed}",
        "adapter": _digest((saved.folder / ADAPTER).read_bytes()),
        "method": to_dict(named.method),
        "backbone": saved.meta["backbone"],
        "questions": _digest(questions.read_bytes()),
        "layout": layout.fingerprint(),
        "max_new_tokens": config.max_new_tokens,
        "temperatures": dict(config.temperatures),
        "precision": named.hardware.precision,
        "seed": named.seed,
    }
    return dict(json.loads(json.dumps(identity)))  # as it is read again


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _check_folder(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / MT_BENCH
    if not path.is_file():
        for name in (ANSWERS, JUDGMENTS):
            if (folder / name).exists():
                raise UserError(f"{folder / name}: nothing says what it was made from; choose another hydra.run.dir")
        return
    try:
        there = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read, so its answers cannot be gone on with: {error}") from None
    differs = [key for key, value in identity.items() if there.get(key) != value]
    if differs:
        raise UserError(
            f"hydra.run.dir = {folder}: holds answers made with another {', '.join(differs)}; nothing was changed, "
            "choose another"
        )
