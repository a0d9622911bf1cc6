"""Runs to cells: a row is a method at its settings, a column a task and metric, a cell the runs over seeds.

Runs of one cell must agree in everything but the seed that can move a result; `gather` refuses a cell that mixes.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from iapt.config.errors import UserError
from iapt.config.fields import Role
from iapt.config.roles import role_of
from iapt.folder.summary import FAILED, OK
from iapt.report.runs import AGREED, AGREED_SETTINGS, VERSIONED, Run, short

MUST_AGREE = (*AGREED_SETTINGS, *AGREED, *(f"versions.{package}" for package in VERSIONED), "seed")
INIT_FROM = "method.init_from"  # known by the task of the adapter, which has a folder of its own for every seed


@dataclass(frozen=True, order=True)
class Column:
    """A task and one of its metrics."""

    task: str
    metric: str


@dataclass(frozen=True)
class Row:
    """A method, and the settings that set it apart from its other rows."""

    method: str
    variant: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.method, *(f"{key.removeprefix('method.')}={value}" for key, value in self.variant)])


@dataclass
class Cell:
    """The runs of one row on one column's task, and their test values (fractions of 1) in the order of `finished`."""

    metric: str
    runs: list[Run]
    finished: list[Run] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # why the others gave no value

    @property
    def median(self) -> float | None:
        """Over seeds."""
        return statistics.median(self.values) if self.values else None

    @property
    def mean(self) -> float | None:
        """Over seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """The sample standard deviation over seeds (n - 1); None below two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass
class Board:
    """All cells of one backbone.

    Attributes:
        notes: what a reader must know: runs left out, columns whose rows are not alike.
    """

    backbone: str
    rows: list[Row]
    columns: list[Column]
    cells: dict[tuple[Row, Column], Cell]
    notes: list[str]

    def finished(self, row: Row) -> list[Run]:
        """The row's finished runs, each once."""
        runs = {id(run): run for (r, _), cell in self.cells.items() if r == row for run in cell.finished}
        return list(runs.values())


def gather(runs: Sequence[Run], allow_mixed: Collection[str] = (), all_metrics: bool = False) -> list[Board]:
    """A board for each backbone, in the order in which they appear.

    Args:
        runs: as `read_runs` gives them.
        allow_mixed: keys of `MUST_AGREE` that runs of one cell may differ in.
        all_metrics: a column for each metric of a task, not just for the reported one.

    Raises:
        UserError: a cell mixes what must not be mixed; names every such key, its values and folders.
    """
    notes, kept = _sort_out(runs)
    by_backbone: dict[str, list[Run]] = defaultdict(list)
    for run in kept:
        by_backbone[str(run.name("backbone"))].append(run)
    problems: list[str] = []
    boards = []
    for number, (backbone, members) in enumerate(by_backbone.items()):
        board = _board(backbone, members, allow_mixed, all_metrics, problems)
        board.notes[:0] = notes if number == 0 else []
        boards.append(board)
    if problems:
        raise UserError(
            "runs of one cell differ in what they must share\n" + "\n".join(f"  {p}" for p in problems)
            + "\n  Give folders that belong together, or --allow-mixed KEY for each key to let pass"
        )  # fmt: skip
    if not boards:
        raise UserError("nothing to report\n" + "\n".join(f"  {note}" for note in notes))
    return boards


def row_settings(run: Run) -> dict[str, str]:
    """The settings of a run that can give it a row of its own."""
    found = {key: _word(value) for key, value in run.settings.items() if Role.ROW in role_of(key)}
    return {**found, INIT_FROM: _word(run.init_from)}


def _sort_out(runs: Sequence[Run]) -> tuple[list[str], list[Run]]:
    """Notes on the runs that have no place in a table, and the others."""
    notes, kept = [], []
    trained = {(run.folder, run.name("task")) for run in runs}
    for run in runs:
        where = short(run.folder)
        if run.name("task") is None or run.name("method") is None:
            notes.append(f"left out {where}: does not say its task and method ({run.reason or run.status})")
        elif run.checkpoint and run.summary.split not in (None, "test"):
            notes.append(f"left out {where}: an evaluation of {run.summary.split}, not of test")
        elif run.checkpoint and (run.checkpoint, run.name("task")) in trained:
            notes.append(f"left out {where}: scores again what a run in this report has trained and scored")
        else:
            kept.append(run)
    return notes, kept


def _board(
    backbone: str, runs: list[Run], allow_mixed: Collection[str], all_metrics: bool, problems: list[str]
) -> Board:
    varying = _varying(runs)
    grouped: dict[tuple[Row, str], list[Run]] = defaultdict(list)
    for run in runs:
        method, own = str(run.name("method")), row_settings(run)
        variant = tuple((key, own.get(key, "?")) for key in varying[method])
        grouped[Row(method, variant), str(run.name("task"))].append(run)
    metrics = {task: _metrics([r for r in runs if r.name("task") == task], all_metrics) for _, task in grouped}
    columns = [Column(task, metric) for task in sorted(metrics) for metric in metrics[task]]
    rows = list(dict.fromkeys(row for row, _ in grouped))
    notes: list[str] = []
    cells = {}
    for (row, task), members in grouped.items():
        used = _without_retried(members, notes)
        problems += _mixed(f"{row} on {task} ({backbone})", used, allow_mixed)
        for metric in metrics[task]:
            cells[row, Column(task, metric)] = _cell(metric, used)
    for task in sorted(metrics):
        notes += _unlike_rows(task, {row: members for (row, t), members in grouped.items() if t == task})
    notes += [f"mixed on request: {key}" for key in allow_mixed] if allow_mixed else []
    return Board(backbone, rows, columns, cells, notes)


def _varying(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Method -> the settings in which its runs on one task differ."""
    seen: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for run in runs:
        for key, value in row_settings(run).items():
            seen[str(run.name("method")), str(run.name("task"))][key].add(value)
    found: dict[str, list[str]] = defaultdict(list)
    for (method, _), keys in seen.items():
        found[method] += [k for k, values in keys.items() if len(values) > 1 and k not in found[method]]
    return found


def _metrics(runs: list[Run], all_metrics: bool) -> list[str]:
    names: dict[str, None] = {}
    for run in runs:
        if run.summary.metric:
            names[run.summary.metric] = None
        if all_metrics:
            scored = run.summary.metrics.get("test") or {}
            names |= dict.fromkeys(
                k.removesuffix("_note") for k, v in scored.items() if _number(v) or k.endswith("_note")
            )
    # A task none of whose runs got as far as a score still has a column.
    configured = [m for run in runs for m in run.settings.get("task.metrics") or []]
    return list(names) or configured[:1] or ["?"]


def _cell(metric: str, runs: list[Run]) -> Cell:
    cell = Cell(metric, runs)
    for run in runs:
        value = run.value(metric) if run.status == OK else None
        if _number(value):
            cell.finished.append(run)
            cell.values.append(float(value))
        elif run.status == OK:
            cell.reasons.append(f"{short(run.folder)}: {value or f'{metric} was not scored'}")
        else:
            cell.reasons.append(f"{short(run.folder)}: {run.status}: {run.reason}")
    return cell


def _without_retried(runs: list[Run], notes: list[str]) -> list[Run]:
    """Without the attempts that failed where another run of the same cell and seed finished."""
    done = {run.seed for run in runs if run.status == OK}
    for run in runs:
        if run.status != OK and run.seed in done:
            notes.append(f"left out {short(run.folder)}: {run.status}, and another run of its cell and seed finished")
    return [run for run in runs if run.status == OK or run.seed not in done]


def _mixed(name: str, runs: list[Run], allowed: Collection[str]) -> list[str]:
    problems = []
    finished = [run for run in runs if run.status == OK]
    for key in MUST_AGREE:
        if key in allowed or key == "seed":
            continue
        values: dict[str, list[str]] = defaultdict(list)
        for run in finished:
            if key in run.circumstances:
                values[run.circumstances[key]].append(short(run.folder))
        if len(values) > 1:
            told = "; ".join(f"{value} in {_some(folders)}" for value, folders in values.items())
            problems.append(f"{name}: {key}: {told}")
    if "seed" not in allowed:
        seeds: dict[Any, list[str]] = defaultdict(list)
        for run in finished:
            seeds[run.seed].append(short(run.folder))
        repeated = {seed: folders for seed, folders in seeds.items() if len(folders) > 1}
        problems += [f"{name}: seed: {seed} more than once, in {_some(f)}" for seed, f in repeated.items()]
    return problems


def _unlike_rows(task: str, rows: dict[Row, list[Run]]) -> list[str]:
    """A word about what the rows of a column do not share, for their values are read side by side."""
    notes = []
    for key in MUST_AGREE:
        values: dict[str, dict[str, None]] = defaultdict(dict)
        for row, runs in rows.items():
            for run in runs:
                if run.status == OK and key in run.circumstances:
                    values[run.circumstances[key]][str(row)] = None
        if len(values) > 1:
            told = "; ".join(f"{value} ({', '.join(names)})" for value, names in values.items())
            notes.append(f"{task}: rows differ in {key}: {told}")
    return notes


def _some(folders: list[str]) -> str:
    return ", ".join(folders[:3]) + (f" and {len(folders) - 3} more" if len(folders) > 3 else "")


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def state(cell: Cell | None) -> str:
    """What a cell without any value says: `not run`, `skipped`, `failed` or `unfinished`."""
    if cell is None or not cell.runs:
        return "not run"
    if any(run.status == OK for run in cell.runs):
        return "skipped"
    return FAILED if any(run.status == FAILED for run in cell.runs) else "unfinished"
