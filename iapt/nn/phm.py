"""Parameterised hypercomplex multiplication: a linear map as a sum of Kronecker products."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PHMLinear(nn.Module):
    """y = x W + b with W = sum_i A_i (x) B_i, A_i (n, n), B_i (in/n, out/n) (Zhang et al., ICLR 2021).

    About n times fewer weights than a dense map. All entries start at N(0, 0.05^2), as IDPG has it.

    Raises:
        ValueError: if n does not divide both widths.
    """

    def __init__(self, inputs: int, outputs: int, n: int, bias: bool = True) -> None:
        super().__init__()
        if inputs % n or outputs % n:
            raise ValueError(f"PHM with n = {n} needs widths that n divides, got {inputs} and {outputs}")
        self.n = n
        self.left = nn.Parameter(torch.randn(n, n, n) * 0.05)  # A
        self.right = nn.Parameter(torch.randn(n, inputs // n, outputs // n) * 0.05)  # B
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without ever forming W: x is read as an (n, in/n) block."""
        block = x.unflatten(-1, (self.n, -1))
        # out[c, o] = sum_i,a A_i[a, c] sum_k x[a, k] B_i[k, o]
        y = torch.einsum("...ak,iko->...iao", block, self.right)
        y = torch.einsum("...iao,iac->...co", y, self.left).flatten(-2)
        return y if self.bias is None else y + self.bias


def phm_parameters(inputs: int, outputs: int, n: int, bias: bool = True) -> int:
    """n^3 + in out / n (+ out)."""
    return n**3 + inputs * outputs // n + (outputs if bias else 0)
