"""IPT: instance-wise prompt tuning (Jiang et al., 2022, arXiv 2206.01958), its token table tied to the embeddings.

The first s tokens of the instruction are looked up in a table of prompt embeddings, and an encoder turns the rows into
s soft tokens at the input (R, from the authors' code): P = Enc(T[x_1 .. x_s]), T (V, d). Such a table weighs more than
a large backbone's budget allows, so here its rows are made of the frozen embeddings through a bottleneck, and the
encoder works inside of it, between the projections (I):

    T[x] = tanh(W_1 E[x] + b_1)                     (r)
    P    = W_2 Enc(T[x_1 .. x_s]) + b_2             (s, d)

    identity    Enc(t) = t; P is then a row of a (V, d) table of rank r for each token
    mlp         Enc(t_i) = V_2 relu(V_1 t_i + c_1) + c_2
    lstm        one bidirectional LSTM over the s rows, half of r a direction

The authors' fourth encoder, TextCNN, and their prefix variant are left out. Their padding token has a row like any
other; so here an instruction shorter than s is filled up with one learned row t_0 (I). E[x] is read where the first
layer reads it: on backbones that add position embeddings these are included, for P as for the tokens (I). Tokens
are counted from the start of the instruction, so a template that begins with more than s tokens of fixed text makes P
the same for every instance.

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iapt.config.fields import at_least, choice
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.method import SoftPrompt
from iapt.nn.norm import cast_and_normalize


@dataclass
class IptConfig(SoftPromptConfig):
    """The settings of IPT. `num_soft_tokens` is s (R: 100). `bottleneck` is r, the budget knob; it must be even for
    the encoder lstm.
    """

    learning_rate: float = at_least(1e-2, 0)
    num_soft_tokens: int = at_least(20, 1)
    position: str = choice("before_instruction", "before_instruction", "after_instruction")
    encoder: str = choice("mlp", "identity", "mlp", "lstm")
    bottleneck: int = at_least(64, 1)
    # Token embeddings differ in scale between backbones by orders of magnitude; tanh would be linear on small ones.
    normalize_input: bool = True

    def problems(self) -> list[str]:
        if self.encoder == "lstm" and self.bottleneck % 2:
            return [f"method.bottleneck = {self.bottleneck}: must be even, the LSTM's two directions share it"]
        return []

    def size_knob(self) -> SizeKnob:
        return SizeKnob("bottleneck", 2 if self.encoder == "lstm" else 1)


class LstmEncoder(nn.Module):
    """One bidirectional LSTM: (B, s, r) -> (B, s, r)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width // 2, bidirectional=True, batch_first=True)

    def forward(self, rows: Tensor) -> Tensor:
        return self.lstm(rows)[0]


class Ipt(SoftPrompt):
    """The method's module: `down` (d -> r), `missing` (r,), `encoder` and `up` (r -> d)."""

    def __init__(self, config: IptConfig, width: int) -> None:
        super().__init__()
        self.num_soft_tokens = config.num_soft_tokens
        self.position = config.position
        self.normalize_input = config.normalize_input
        r = config.bottleneck
        self.down = nn.Linear(width, r)
        self.missing = nn.Parameter(torch.empty(r).uniform_(-0.5, 0.5))  # as the authors start their table's rows
        self.encoder: nn.Module = nn.Identity()
        if config.encoder == "mlp":
            self.encoder = nn.Sequential(nn.Linear(r, r), nn.ReLU(), nn.Linear(r, r))
        elif config.encoder == "lstm":
            self.encoder = LstmEncoder(r)
        self.up = nn.Linear(r, width)

    def idle(self) -> frozenset[str]:
        """`missing` gets no gradient where every instruction, of two tokens at least, has all the tokens that are
        asked for.
        """
        return frozenset({"missing"}) if self.num_soft_tokens <= 2 else frozenset()

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor | None:
        if layer > 0:
            return None
        states, there = first_tokens(states, mask, self.num_soft_tokens)
        states = cast_and_normalize(states, self.missing, self.normalize_input)
        rows = self.down(states).tanh()
        rows = torch.where(there[..., None], rows, self.missing.to(rows.dtype))
        return previous + self.up(self.encoder(rows))


def first_tokens(states: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` real tokens of each row, in order.

    Args:
        states: (B, N, d).
        mask: (B, N) bool, False on padding, which is on the left.
        count: how many.

    Returns:
        (B, count, d), and (B, count) bool: False where the row has no such token; what stands there is any token's.
    """
    length = mask.sum(1, keepdim=True)
    wanted = torch.arange(count, device=mask.device).expand(len(mask), -1)
    columns = (mask.shape[1] - length + wanted).clamp(max=mask.shape[1] - 1)
    return states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1])), wanted < length


def build(config: IptConfig, backbone: Backbone) -> Ipt:
    """The method at its start: torch's defaults for all maps."""
    return Ipt(config, backbone.hidden_size)


def count(config: IptConfig, backbone: Backbone) -> int:
    """r (d + 1) + r + d (r + 1), and between them: mlp 2 r (r + 1); lstm, two directions of h = r / 2 with four gates
    and torch's two biases a gate: 8 h (r + h + 2)."""
    d, r = backbone.hidden_size, config.bottleneck
    h = r // 2
    encoder = {"identity": 0, "mlp": 2 * r * (r + 1), "lstm": 8 * h * (r + h + 2)}[config.encoder]
    return r * (d + 2) + d * (r + 1) + encoder


register("ipt", MethodSpec(IptConfig, build, count))
