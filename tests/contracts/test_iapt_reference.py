"""IAPT against a slow reference written from the equations alone: float64, one row, no hooks, no cache, no padding.

The reference computes a Llama by hand (RMSNorm, rotary attention with grouped keys, SwiGLU), so that it shares no
line with the engine or with transformers' forward pass.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from iapt.model.adapted import AdaptedModel
from tests.contracts.conftest import Case, batch, build_model, examples


def rms_norm(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, positions: range, theta: float) -> Tensor:
    """x (heads, n, e): pairs (i, i + e/2) turned by position * theta^(-2i/e)."""
    half = x.shape[-1] // 2
    angles = torch.tensor([[p * theta ** (-i / half) for i in range(half)] for p in positions], dtype=x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def llama_layer(layer, config, x: Tensor, scaled: range = range(0), scale: float = 1.0) -> Tensor:
    """x (n, d) of consecutive positions 0..n-1; the values of the `scaled` ones are multiplied by `scale`."""
    n, heads, groups = len(x), config.num_attention_heads, config.num_key_value_heads
    attention, eps = layer.self_attn, config.rms_norm_eps
    theta = config.rope_parameters["rope_theta"]
    normed = rms_norm(x, layer.input_layernorm.weight, eps)
    q, k, v = (
        (normed @ m.weight.T).view(n, count, -1).transpose(0, 1)
        for m, count in ((attention.q_proj, heads), (attention.k_proj, groups), (attention.v_proj, groups))
    )
    q, k = rotate(q, range(n), theta), rotate(k, range(n), theta)
    v = torch.stack([v[:, row] * (scale if row in scaled else 1.0) for row in range(n)], 1)
    mixed = []
    for head in range(heads):
        group = head // (heads // groups)
        scores = q[head] @ k[group].T / math.sqrt(q.shape[-1])
        for row in range(n):
            scores[row, row + 1 :] = -math.inf
        mixed.append(scores.softmax(-1) @ v[group])
    x = x + torch.cat(mixed, -1) @ attention.o_proj.weight.T
    normed = rms_norm(x, layer.post_attention_layernorm.weight, eps)
    gate, up = normed @ layer.mlp.gate_proj.weight.T, normed @ layer.mlp.up_proj.weight.T
    return x + (gate / (1 + torch.exp(-gate)) * up) @ layer.mlp.down_proj.weight.T


def pooled(method, generator, z: Tensor) -> Tensor:
    """z (n, r) -> (s, r)."""
    n, s = len(z), method.num_soft_tokens
    if generator.pooling == "self_attention":
        weights = torch.exp(z @ generator.queries)
        return (weights / weights.sum(0)).T @ z
    if generator.pooling == "last":
        return torch.stack([z[max(0, n - s + i)] for i in range(s)])
    segments = [z[math.floor(i * n / s) : math.ceil((i + 1) * n / s)] for i in range(s)]
    return torch.stack([p.mean(0) if generator.pooling == "mean" else p.max(0).values for p in segments])


def activated(activation, q: Tensor) -> Tensor:
    if isinstance(activation, torch.nn.ReLU):
        return q * (q > 0)
    if isinstance(activation, torch.nn.GELU):
        return q * 0.5 * (1 + torch.erf(q / math.sqrt(2)))
    a, b = activation.numerator.tolist(), activation.denominator.tolist()
    top = sum(a[j] * q**j for j in range(len(a)))
    bottom = 1 + abs(sum(b[k] * q ** (k + 1) for k in range(len(b))))
    return top / bottom


def soft_tokens(method, index: int, states: Tensor) -> Tensor:
    """The generator's four steps for one instruction: states (n, d) -> (s, d)."""
    generator = method.generators[index // method.share_every]
    z = rms_norm(states, 1.0, 1e-6) @ generator.down
    return activated(method.activations[index], pooled(method, generator, z)) @ generator.up


def gate(method, index: int) -> float:
    return math.tanh(method.gates[index]) if method.gates is not None else 1.0


def reference_loss(model: AdaptedModel, instruction: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    lm, method = model.lm, model.method
    config, table = lm.config, lm.get_input_embeddings().weight
    n, s = len(instruction), method.num_soft_tokens
    words = table[torch.tensor(instruction)]
    answer = table[torch.tensor(response)]
    blank = torch.zeros(s, config.hidden_size, dtype=torch.float64)
    if method.position == "before_instruction":
        x = torch.cat([blank, words, answer])
        for index, layer in enumerate(lm.model.layers):
            x = torch.cat([soft_tokens(method, index, x[s : s + n]), x[s:]])
            x = llama_layer(layer, config, x, range(s), gate(method, index))
    else:
        bare, x = words, torch.cat([words[:-1], blank, words[-1:], answer])
        for index, layer in enumerate(lm.model.layers):
            # What the generator reads never sees a soft token: the bare backbone's states.
            x = torch.cat([x[: n - 1], soft_tokens(method, index, bare), x[n - 1 + s :]])
            x = llama_layer(layer, config, x, range(n - 1, n - 1 + s), gate(method, index))
            bare = llama_layer(layer, config, bare)
    x = rms_norm(x, lm.model.norm.weight, config.rms_norm_eps)
    log_p = (x @ lm.lm_head.weight.T).log_softmax(-1)
    start = n + s - 1
    return -sum(log_p[start + i, token] for i, token in enumerate(response))


def run_in_float64(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes Llama's norms and rotary angles in float32 whatever the dtype: too coarse for 1e-9."""

    def norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)

    def rotary(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        theta, half = model.lm.config.rope_parameters["rope_theta"], self.inv_freq.numel()
        frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = position_ids.double()[:, :, None] * frequencies
        return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rotary)


SWITCHES = [
    {},
    {"share_every": 2},
    {"pooling": "mean", "activation": "relu", "upper_activation": "gelu", "output_start": "gated"},
    {"pooling": "max", "rational_start": "tanh", "numerator_degree": 5, "denominator_degree": 4},
    {"pooling": "last", "upper_activation": "relu", "activation_training": "frozen", "output_start": "gated"},
]


@pytest.mark.parametrize("position", ["before_instruction", "after_instruction"])
@pytest.mark.parametrize("options", SWITCHES, ids=lambda o: "-".join(map(str, o.values())) or "plain")
def test_engine_equals_the_equations_in_float64(position: str, options: dict, monkeypatch: pytest.MonkeyPatch):
    case = Case("iapt", {"position": position, "bottleneck": 8, **options})
    model = build_model(case, "llama", dtype=torch.float64)
    model.method.double()
    run_in_float64(model, monkeypatch)
    items = examples()
    with torch.no_grad():
        expected = torch.stack([reference_loss(model, item.instruction, item.response) for item in items])
        alone = torch.stack([model.loss(batch([item]), "sum") for item in items])
        together = model.loss(batch(items, extra_left=3, extra_right=2), "sum")
    assert alone.dtype == torch.float64
    assert (alone - expected).abs().max() < 1e-9
    assert (together - expected.sum()).abs() < 1e-9
