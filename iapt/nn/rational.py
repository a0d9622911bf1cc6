"""Rational activation: g(x) = sum_j a_j x^j / (1 + |sum_k b_k x^k|), trained coefficients.

The "safe" Pade activation unit (Molina et al., ICLR 2020), as IAPT's group uses it with m = 6, n = 5
(label S, docs/methods.md). It starts as a least-squares fit of a known function; `scripts/fit_rational.py` makes the
fits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

import torch
from torch import Tensor, nn

# What a rational activation may start as, and what it may be replaced by.
FUNCTIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


@dataclass(frozen=True)
class Fit:
    """Coefficients under which a rational activation is close to a known function.

    Attributes:
        numerator: a_0 .. a_m.
        denominator: b_1 .. b_n. Odd ones are 0 and even ones positive: the denominator starts smooth and at least 1
            (the widely copied 5/4 coefficients of GELU change sign at |x| = 4.44 and are unusable).
        max_error: the largest distance from the function on `FIT_RANGE`.
    """

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    max_error: float


def _read_fits() -> tuple[tuple[float, float], dict[tuple[str, tuple[int, int]], Fit]]:
    stored = json.loads(resources.files("iapt.nn").joinpath("rational_fits.json").read_text())
    fits = {}
    for name, by_degrees in stored["fits"].items():
        for one in by_degrees.values():
            fit = Fit(tuple(one["numerator"]), tuple(one["denominator"]), one["max_error"])
            fits[name, (len(fit.numerator) - 1, len(fit.denominator))] = fit
    low, high = stored["range"]
    return (low, high), fits


FIT_RANGE, FITS = _read_fits()  # FITS: (function, (m, n)) -> its fit


class Rational(nn.Module):
    """A rational function with its own coefficients.

    Args:
        degrees: (m, n).
        start: the function it starts as, a key of `FUNCTIONS`.

    Raises:
        ValueError: for a pair of them without a fit.
    """

    def __init__(self, degrees: tuple[int, int] = (6, 5), start: str = "gelu") -> None:
        super().__init__()
        if (start, degrees) not in FITS:
            raise ValueError(f"no fit of {start} with degrees {degrees}; known: {sorted(FITS)}")
        self.start = FITS[start, degrees]
        self.numerator = nn.Parameter(torch.tensor(self.start.numerator))  # a_0 .. a_m
        self.denominator = nn.Parameter(torch.tensor(self.start.denominator))  # b_1 .. b_n

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape; returns x's dtype.

        Computed in the coefficients' dtype, float32 or better: x^6 overflows float16 at 6.4 and bfloat16 loses
        two decimals.
        """
        with torch.autocast(x.device.type, enabled=False):
            value = x.to(self.numerator.dtype)
            top = _horner(self.numerator, value)
            bottom = 1 + (_horner(self.denominator, value) * value).abs()
            return (top / bottom).to(x.dtype)


def _horner(coefficients: Tensor, x: Tensor) -> Tensor:
    result = coefficients[-1].expand_as(x)
    for coefficient in reversed(coefficients.unbind()[:-1]):
        result = result * x + coefficient
    return result
