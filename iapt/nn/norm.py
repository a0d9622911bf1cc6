"""What a generator makes of hidden states before it reads them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rms(states: Tensor) -> Tensor:
    """(..., d), each vector at a root mean square of 1."""
    return F.rms_norm(states, states.shape[-1:], eps=1e-6)


def cast_and_normalize(states: Tensor, weight: Tensor, normalize: bool) -> Tensor:
    """States (..., d) in a dtype as wide as that of the `weight` that reads them, at unit RMS if `normalize`."""
    states = states.to(torch.promote_types(states.dtype, weight.dtype))
    return unit_rms(states) if normalize else states
