"""Rational activation, pooling and PHM against what they claim to be."""

from __future__ import annotations

import pytest
import torch

from iapt.nn.phm import PHMLinear, phm_parameters
from iapt.nn.pooling import mean_pool, self_attention_pool
from iapt.nn.rational import GELU_FITS, Rational


@pytest.mark.parametrize("degrees", GELU_FITS)
def test_rational_starts_at_gelu(degrees: tuple[int, int]):
    x = torch.linspace(-8, 8, 4001)
    error = (Rational(degrees)(x) - torch.nn.functional.gelu(x)).abs().max()
    assert error <= 0.0041


def test_rational_follows_its_formula_after_training():
    module = Rational((5, 4)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    a, b = module.numerator, module.denominator
    top = sum(a[j] * x**j for j in range(6))
    bottom = 1 + sum(b[k] * x ** (k + 1) for k in range(4)).abs()
    torch.testing.assert_close(module(x), top / bottom)


def test_rational_computes_in_float32_under_autocast():
    x = torch.linspace(-8, 8, 101).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = Rational()(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, Rational()(x.float()).bfloat16())


def test_unknown_degrees_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        Rational((3, 2))


def test_pooling_equals_a_loop_and_ignores_padding():
    states, queries = torch.randn(3, 6, 4), torch.randn(4, 2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    pooled = self_attention_pool(states, queries, mask)
    means = mean_pool(states, mask)
    for row in range(3):
        real = states[row, mask[row]]
        for token in range(2):
            weights = (real @ queries[:, token]).softmax(0)
            torch.testing.assert_close(pooled[row, token], (weights[:, None] * real).sum(0))
        torch.testing.assert_close(means[row], real.mean(0))


def test_phm_is_the_sum_of_kronecker_products():
    module = PHMLinear(8, 12, 4)
    torch.nn.init.normal_(module.bias)
    dense = sum(torch.kron(a, b) for a, b in zip(module.left, module.right, strict=True))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(module(x), x @ dense + module.bias)
    assert phm_parameters(8, 12, 4) == sum(p.numel() for p in module.parameters())
    with pytest.raises(ValueError, match="n = 5"):
        PHMLinear(8, 12, 5)
