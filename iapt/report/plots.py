"""Curves of training, quality against size and cost, learned activations; drawn into files, without a display."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state

from iapt.config.visible import visible
from iapt.folder.summary import OK
from iapt.nn.rational import FIT_RANGE
from iapt.report.cells import Board, Cell, Column, Row
from iapt.report.runs import Run
from iapt.report.sheet import column_name, file_name

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b", "#000000", "#b5bd00")
MARKERS = "osD^vP*X<>"
DASHES = ("-", "--", "-.")  # a dotted line is a run without an end
START = 4  # the colour of an activation's start, which no seed gets
MOST_COLUMNS = 3
LABEL = 0.2, 0.07  # width and height of a small label, as shares of the axes


@dataclass
class Plot:
    """A figure, or the reason why there is none.

    Attributes:
        name: a file name without suffix.
        title: what it shows; also read aloud in place of the picture.
    """

    name: str
    title: str
    figure: Figure | None = None
    reason: str = ""


def plots(board: Board) -> list[Plot]:
    """All plots of a board; those without data say why."""
    suffix = file_name(board.backbone)
    made = [
        Plot(f"learning_curves_{suffix}", "Learning curves: dev loss by step, a line for each seed", *_learning(board)),
        Plot(f"soft_tokens_{suffix}", "Test value by number of soft tokens: median, min to max", *_soft_tokens(board)),
        Plot(f"parameters_{suffix}", "Test value by trainable parameters: median, min to max", *_parameters(board)),
        Plot(f"cost_{suffix}", "Test value by training time; the area is the peak memory", *_cost(board)),
    ]
    return made + _activations(board, suffix)


Drawn = tuple[Figure | None, str]


def show_names_as_they_are(figure: Figure) -> None:
    """Matplotlib reads what stands between two dollars as a formula, and has no picture of a control character."""
    texts = [text for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts)]
    legends = [*figure.legends, *(legend for ax in figure.axes if (legend := ax.get_legend()))]
    for text in (*texts, *(text for legend in legends for text in legend.get_texts())):
        text.set_parse_math(False)
        text.set_text(visible(text.get_text()))


def _style(number: int) -> tuple[str, str, str]:
    """Colour, marker and dash of a series; where colours come round again, markers and dashes have moved on."""
    round_, i = divmod(number, len(COLOURS))
    return COLOURS[i], MARKERS[(number + round_) % len(MARKERS)], DASHES[round_ % len(DASHES)]


def _styles(board: Board) -> dict[str, tuple[str, str, str]]:
    """The style of each row, by its name."""
    return {str(row): _style(i) for i, row in enumerate(board.rows)}


def _grid(count: int, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    columns = min(MOST_COLUMNS, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained", facecolor="white")
    return figure, [figure.add_subplot(lines, columns, i + 1) for i in range(count)]


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    named = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, fontsize=8)


def _learning(board: Board) -> Drawn:
    curves: dict[str, list[tuple[Row, Run, list[tuple[int, float]]]]] = defaultdict(list)
    for (row, column), cell in board.cells.items():
        if column != next(c for c in board.columns if c.task == column.task):
            continue  # a task's other metrics have the same curves
        for run in cell.runs:
            points = [(int(r["step"]), float(r["dev_loss"])) for r in run.log if r.get("dev_loss") is not None]
            if len(points) > 1:
                curves[column.task].append((row, run, points))
    if not curves:
        return None, "no metrics.jsonl has two dev losses or more"
    styles = _styles(board)
    figure, axes = _grid(len(curves))
    for ax, (task, drawn) in zip(axes, sorted(curves.items()), strict=True):
        for row, run, points in drawn:
            colour, _, dash = styles[str(row)]
            line = dash if run.status == OK else ":"
            ax.plot(*zip(*points, strict=True), color=colour, linestyle=line, linewidth=1, label=str(row))
        ax.set(title=task, xlabel="step", ylabel="dev loss\n(nats per response token)")
    _legend(figure, axes)
    return figure, ""


def _soft_tokens(board: Board) -> Drawn:
    def place(cell: Cell) -> float | None:
        return _common(run.num_soft_tokens for run in cell.finished)

    without = "method.num_soft_tokens"
    return _against(board, place, without, "soft tokens", "no method ran with two numbers of soft tokens or more")


def _parameters(board: Board) -> Drawn:
    def place(cell: Cell) -> float | None:
        return _common(run.summary.trainable_params for run in cell.finished)

    why = "no task has runs with two numbers of trainable parameters or more"
    return _against(board, place, None, "trainable parameters", why)


def _against(board: Board, place: Callable[[Cell], float | None], swept: str | None, name: str, reason: str) -> Drawn:
    """Medians and ranges against a number of each cell. With `swept`, only series that vary in that setting."""
    series: dict[Column, dict[str, list[tuple[float, Cell]]]] = defaultdict(lambda: defaultdict(list))
    for (row, column), cell in board.cells.items():
        x = place(cell) if cell.values else None
        if x is None or (swept is None and x <= 0):
            continue
        # Along the axis rows that differ only in what moves along it are one series.
        label = str(Row(row.method, tuple(v for v in row.variant if v[0] != swept))) if swept else row.method
        series[column][label].append((x, cell))
    if swept:
        kept = {c: {n: p for n, p in lines.items() if len({x for x, _ in p}) > 1} for c, lines in series.items()}
    else:
        kept = {c: dict(s) for c, s in series.items() if len({x for points in s.values() for x, _ in points}) > 1}
    kept = {column: lines for column, lines in kept.items() if lines}
    if not kept:
        return None, reason
    figure, axes = _grid(len(kept))
    names = list(dict.fromkeys(label for lines in kept.values() for label in lines))
    for ax, (column, lines) in zip(axes, sorted(kept.items()), strict=True):
        for label, points in lines.items():
            points.sort(key=lambda point: point[0])
            places = [p for p, _ in points]
            y = [100 * (cell.median or 0.0) for _, cell in points]
            low = [m - 100 * min(cell.values) for m, (_, cell) in zip(y, points, strict=True)]
            high = [100 * max(cell.values) - m for m, (_, cell) in zip(y, points, strict=True)]
            colour, marker, dash = _style(names.index(label))
            # Two rows of one size are two choices, not two points of a line.
            joined = dash if len(set(places)) == len(places) else "none"
            ax.errorbar(
                places, y, [low, high], color=colour, marker=marker, linestyle=joined, linewidth=1, markersize=5,
                capsize=3, label=label,
            )  # fmt: skip
        ax.set(title=column_name(board, column), xlabel=name, ylabel=f"{column.metric} (%)")
        values = {x for points in lines.values() for x, _ in points}
        if max(values) >= 20 * min(values):
            ax.set_xscale("log")
        if swept:  # a setting has the values it was given, and none between
            ax.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
            ax.minorticks_off()
    _legend(figure, axes)
    return figure, ""


def _cost(board: Board) -> Drawn:
    points: dict[Column, list[tuple[Row, float, float, float]]] = defaultdict(list)
    for (row, column), cell in board.cells.items():
        seconds = [r.summary.train_seconds for r in cell.finished]
        memory = [r.summary.peak_memory_bytes for r in cell.finished]
        if cell.median is not None and None not in [*seconds, *memory]:
            middle = (statistics.median(map(float, seconds)), statistics.median(map(float, memory)))  # type: ignore[arg-type]
            points[column].append((row, *middle, 100 * cell.median))
    if not points:
        return None, "no finished run records its training time and peak memory"
    styles = _styles(board)
    largest = max(memory for drawn in points.values() for _, _, memory, _ in drawn)
    figure, axes = _grid(len(points))
    for ax, (column, drawn) in zip(axes, sorted(points.items()), strict=True):
        for row, seconds_, memory_, value in drawn:
            name = f"{row} ({memory_ / 2**30:.2f} GiB)" if len(points) == 1 else str(row)
            size = 30 + 170 * memory_ / largest
            colour, marker, _ = styles[str(row)]
            ax.scatter(seconds_, value, size, color=colour, marker=marker, alpha=0.7, label=name)
        ax.set(title=column_name(board, column), xlabel="training time (s)", ylabel=f"{column.metric} (%)")
        ax.margins(0.15)
        _label_memory(ax, [(seconds_, value, memory_) for _, seconds_, memory_, value in drawn])
    _legend(figure, axes)
    return figure, ""


def _label_memory(ax: Axes, points: Iterable[tuple[float, float, float]]) -> None:
    """The memory (x, y, bytes) beside each point, unless it would cover the label of one before it."""
    ax.autoscale_view()
    taken: list[tuple[float, float]] = []
    for x, y, memory in points:
        across, up = ax.transLimits.transform((x, y))  # as shares of the axes
        if all(abs(across - a) > LABEL[0] or abs(up - u) > LABEL[1] for a, u in taken):
            taken.append((across, up))
            ax.annotate(f"{memory / 2**30:.2f} GiB", (x, y), (6, 6), textcoords="offset points", fontsize=7)


def _activations(board: Board, suffix: str) -> list[Plot]:
    """A plot for each row and task whose runs have learned activations."""
    title, made, fixed = "Learned activations by layer", [], False
    for (row, column), cell in board.cells.items():
        if column != next(c for c in board.columns if c.task == column.task):
            continue
        runs = [run for run in cell.finished if run.activations]
        learned = [run for run in runs if any("end" in layer for layer in run.activations)]
        fixed = fixed or (bool(runs) and not learned)
        if learned:
            name = f"activations_{file_name(str(row))}_{file_name(column.task)}_{suffix}"
            made.append(
                Plot(name, f"{title}: {row} on {column.task}, a line for each seed", _draw_activations(learned))
            )
    why = "the activations were fixed, not learned" if fixed else "no finished run has an activations.json"
    return made or [Plot(f"activations_{suffix}", title, None, why)]


def _draw_activations(runs: list[Run]) -> Figure:
    count = max(len(run.activations) for run in runs)
    colours = [colour for colour in COLOURS if colour != COLOURS[START]]
    figure, axes = _grid(count, 2.8, 2.3)
    for number, ax in enumerate(axes):
        layers = [(run, run.activations[number]) for run in runs if number < len(run.activations)]
        learned = [(run, layer) for run, layer in layers if "end" in layer]
        if learned:
            x = _seen(layer["inputs"] for _, layer in learned)
            ax.plot(x, _gelu(x), color="0.5", linestyle=":", label="GELU")
            ax.plot(x, _rational(learned[0][1]["start"], x), color=COLOURS[START], linestyle="--", label="start")
            for i, (run, layer) in enumerate(learned):
                colour = colours[i % len(colours)]
                ax.plot(x, _rational(layer["end"], x), color=colour, linewidth=1, label=f"seed {run.seed}")
        ax.set_title(f"layer {number}" if learned else f"layer {number}: {layers[0][1].get('activation')}", fontsize=9)
        ax.tick_params(labelsize=7)
    _legend(figure, axes)
    return figure


def _seen(inputs: Iterable[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """201 points over the range of inputs that the layer saw, the fits' range if none were recorded."""
    ends = [(i["min"], i["max"]) for i in inputs if i.get("min") is not None and i["max"] > i["min"]]
    low, high = (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else FIT_RANGE
    return np.linspace(low, high, 201)


def _rational(coefficients: dict[str, list[float]], x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    polyval = np.polynomial.polynomial.polyval
    return polyval(x, coefficients["numerator"]) / (1 + np.abs(polyval(x, [0.0, *coefficients["denominator"]])))


def _gelu(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def _common(values: Iterable[int | None]) -> float | None:
    """The one number that all share, None if they share none."""
    found = set(values)
    only = found.pop() if len(found) == 1 else None
    return None if only is None else float(only)
