"""What became of a trained model's activations: the inputs they get, the curves they turned into, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from iapt.folder.names import ACTIVATIONS, ACTIVATIONS_PICTURE
from iapt.nn.rational import FIT_RANGE, FUNCTIONS, Rational

Array = NDArray[np.float64]
# Fixed bins, so that memory does not grow with the data.
BINS, REACH = 320, 16.0
# The slope of a rational activation always jumps a little at 0, where q is 0 by its formula, as soon as b_1 has moved.
# GELU's slope is about 1: below a hundredth of it nobody would see the kink.
VISIBLE_JUMP = 0.01


@dataclass
class Inputs:
    """The inputs that one activation was given.

    Attributes:
        count: how many numbers.
        low, high: the range they span.
        histogram: (BINS,) int64 over [-REACH, REACH]; the outermost bins also hold what lies beyond.
    """

    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    histogram: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.long))

    def add(self, values: Tensor) -> None:
        """Take in a tensor of any shape."""
        flat = values.detach().flatten().float().cpu()
        self.count += len(flat)
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        bins = ((flat + REACH) * (BINS / (2 * REACH))).floor().clamp(0, BINS - 1).long()
        self.histogram += torch.bincount(bins, minlength=BINS)

    @property
    def range(self) -> tuple[float, float]:
        """The observed range, the fits' range if nothing was observed."""
        return (self.low, self.high) if self.count else FIT_RANGE


def observe(activations: Iterable[nn.Module], run: Callable[[], None]) -> list[Inputs]:
    """The inputs of each activation while `run` goes."""
    seen, handles = [], []
    for activation in activations:
        inputs = Inputs()
        seen.append(inputs)
        handles.append(activation.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.add(args[0])))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def write_activations(folder: Path, activations: Sequence[nn.Module], inputs: Sequence[Inputs]) -> list[str]:
    """Write `activations.json` and `activations.png`.

    Args:
        folder: exists.
        activations: one a layer, `Rational` or of `FUNCTIONS`.
        inputs: what `observe` made of them.

    Returns:
        Lines for the user: where the files are, and the visible kinks.
    """
    layers = [describe(activation, seen) for activation, seen in zip(activations, inputs, strict=True)]
    data, picture = folder / ACTIVATIONS, folder / ACTIVATIONS_PICTURE
    data.write_text(json.dumps({"layers": [{"layer": i, **layer} for i, layer in enumerate(layers)]}, indent=1) + "\n")
    draw(picture, activations, inputs)
    lines = [f"activations, layer by layer: {data} and {picture}"]
    kinks = [
        f"layer {index} at x = {root['x']:.3g} (slope jumps by {root['slope_jump']:.2g})"
        for index, layer in enumerate(layers)
        for root in layer.get("roots", [])
        if root["flagged"]
    ]
    if kinks:
        lines.append(f"a denominator crosses 0 inside |.| and bends the activation: {', '.join(kinks)}")
    return lines


def describe(activation: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """One activation as plain values.

    `roots` are the x of the observed range at which q, the polynomial inside the denominator 1 + |q(x)|, is 0.
    """
    low, high = inputs.range
    x = np.linspace(low, high, 2001)
    occupied = inputs.histogram.nonzero().flatten().tolist() or [0]
    first, last = occupied[0], occupied[-1] + 1
    found: dict[str, Any] = {
        "activation": _name(activation),
        "max_distance_from_gelu": _distance(_curve(activation, x), _curve(nn.GELU(), x)),
        "inputs": {
            "count": inputs.count,
            "min": low if inputs.count else None,
            "max": high if inputs.count else None,
            "histogram": {
                "edges": np.round(_edges()[first : last + 1], 6).tolist(),
                "counts": inputs.histogram[first:last].tolist(),
            },
        },
    }
    if isinstance(activation, Rational):
        (a, b), (start_a, start_b) = _coefficients(activation), _start(activation)
        found |= {
            "start": {"numerator": start_a.tolist(), "denominator": start_b.tolist()},
            "end": {"numerator": a.tolist(), "denominator": b.tolist()},
            "drift": {"numerator": _distance(a, start_a), "denominator": _distance(b, start_b)},
            "max_distance_from_start": _distance(_rational(a, b, x), _rational(start_a, start_b, x)),
            "roots": _roots(a, b, low, high),
        }
    return found


def draw(path: Path, activations: Sequence[nn.Module], inputs: Sequence[Inputs]) -> None:
    """A small picture a layer: the curve, its start, GELU, and the histogram of the inputs behind them."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    columns = min(4, len(activations))
    rows = -(-len(activations) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    edges = _edges()
    for index, (activation, seen) in enumerate(zip(activations, inputs, strict=True)):
        axes = figure.add_subplot(rows, columns, index + 1)
        low, high = seen.range
        x = np.linspace(low, high, 401)
        behind = axes.twinx()
        behind.bar(edges[:-1], seen.histogram.numpy(), np.diff(edges), align="edge", color="0.85")
        behind.set_yticks([])
        axes.set_zorder(behind.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.plot(x, _curve(nn.GELU(), x), color="0.4", linestyle=":", label="GELU")
        if isinstance(activation, Rational):
            axes.plot(x, _rational(*_start(activation), x), color="tab:orange", linestyle="--", label="start")
        axes.plot(x, _curve(activation, x), color="tab:blue", label="end")
        axes.set_xlim(low, high if high > low else low + 1)
        axes.set_title(f"layer {index}: {_name(activation)}", fontsize=9)
        axes.tick_params(labelsize=7)
        if index == 0:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _name(activation: nn.Module) -> str:
    return "rational" if isinstance(activation, Rational) else {v: k for k, v in FUNCTIONS.items()}[type(activation)]


def _coefficients(activation: Rational) -> tuple[Array, Array]:
    numerator, denominator = (c.detach().double().cpu().numpy() for c in (activation.numerator, activation.denominator))
    return numerator, denominator


def _start(activation: Rational) -> tuple[Array, Array]:
    # In float32, as training got them.
    numerator, denominator = (
        np.array(c, dtype=np.float32).astype(np.float64)
        for c in (activation.start.numerator, activation.start.denominator)
    )
    return numerator, denominator


def _rational(a: Array, b: Array, x: Array) -> Array:
    polyval = np.polynomial.polynomial.polyval
    return polyval(x, a) / (1 + np.abs(polyval(x, np.concatenate([[0.0], b]))))


def _curve(activation: nn.Module, x: Array) -> Array:
    if isinstance(activation, Rational):
        return _rational(*_coefficients(activation), x)
    return activation(torch.from_numpy(x)).numpy()


def _roots(a: Array, b: Array, low: float, high: float) -> list[dict[str, Any]]:
    """The real roots of q(x) = sum_k b_k x^k in [low, high].

    There 1 + |q| is 1 and its slope jumps by 2 |q'|, that of the activation p / (1 + |q|) by 2 |p q'|.
    """
    p, q = np.polynomial.Polynomial(a), np.polynomial.Polynomial(np.concatenate([[0.0], b]))
    found = []
    # np.roots, which takes zeros at both ends of q out exactly: at the start 0 is a double root.
    for x in sorted({float(root.real) for root in np.roots(q.coef[::-1]) if abs(root.imag) < 1e-9}):
        if low <= x <= high:
            jump = float(2 * abs(p(x) * q.deriv()(x)))
            found.append({"x": x, "slope_jump": jump, "flagged": jump >= VISIBLE_JUMP})
    return found


def _distance(one: Array, other: Array) -> float:
    return float(np.abs(one - other).max())


def _edges() -> Array:
    return np.linspace(-REACH, REACH, BINS + 1)
