"""Rational activation: g(x) = sum_j a_j x^j / (1 + |sum_k b_k x^k|), trained coefficients.

The "safe" Pade activation unit (Molina et al., ICLR 2020), as IAPT's group uses it with m = 6, n = 5
(label S).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# (a_0..a_m, b_1..b_n), least-squares fits on [-8, 8], largest error 0.004. Odd b are 0, so the denominator starts
# smooth and at least 1; the widely copied 5/4 coefficients change sign at |x| = 4.44 and are unusable.
GELU_FITS: dict[tuple[int, int], tuple[tuple[float, ...], tuple[float, ...]]] = {
    (6, 5): (
        (-0.0040256439, 0.5, 0.42172657, 0.12856441, 0.016965638, 0.00084734864, 3.9874517e-06),
        (0.0, 0.25712882, 0.0, 0.0016946973, 0.0),
    ),
    (5, 4): (
        (-0.0038863639, 0.5, 0.42114528, 0.12763237, 0.016548931, 0.00077707951),
        (0.0, 0.25526473, 0.0, 0.001554159),
    ),
}


class Rational(nn.Module):
    """A rational function with its own coefficients, started at GELU.

    Args:
        degrees: (m, n), a key of `GELU_FITS`.

    Raises:
        ValueError: for degrees without a fit.
    """

    def __init__(self, degrees: tuple[int, int] = (6, 5)) -> None:
        super().__init__()
        if degrees not in GELU_FITS:
            raise ValueError(f"no fit of degrees {degrees}; known: {sorted(GELU_FITS)}")
        numerator, denominator = GELU_FITS[degrees]
        self.numerator = nn.Parameter(torch.tensor(numerator))  # a_0 .. a_m
        self.denominator = nn.Parameter(torch.tensor(denominator))  # b_1 .. b_n

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
