"""P-tuning (Liu et al. 2021, "GPT Understands, Too"): soft tokens at the input, trained through an encoder.

The soft tokens are not free: a table E of as many embeddings runs through a small network that ties them together,
and its outputs enter as input embeddings (section 3.2):

    lstm    P = W2 relu(W1 BiLSTM(E)),   two layers, the original's
    mlp     P = W3 relu(W2 relu(W1 E)),  the lighter alternative that peft ships as PromptEncoder's MLP

After training only P matters, but the encoder is what is saved: training can go on from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iapt.config.fields import at_least, choice
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.method import SoftPrompt


@dataclass
class PTuningConfig(SoftPromptConfig):
    """The settings of P-tuning. `encoder_width` is the mlp's inner width, or the width of the LSTM's two directions
    together; null stands for the backbone's, so that each direction has half of it.
    """

    num_soft_tokens: int = at_least(20, 1)
    position: str = choice("before_instruction", "before_instruction", "after_instruction")
    encoder: str = choice("lstm", "mlp", "lstm")
    encoder_width: int | None = at_least(None, 1)

    def problems(self) -> list[str]:
        if self.encoder == "lstm" and self.encoder_width is not None and self.encoder_width % 2:
            return [f"method.encoder_width = {self.encoder_width}: must be even, the LSTM's two directions share it"]
        return []

    def size_knob(self) -> SizeKnob:
        # The encoder outweighs its tokens by far.
        return SizeKnob("encoder_width", 2 if self.encoder == "lstm" else 1)

    def width(self, backbone: Backbone) -> int:
        """Return `encoder_width` as a number, which is even for the LSTM."""
        width = self.encoder_width or backbone.embedding_size
        return width + width % 2 if self.encoder == "lstm" else width


class LstmEncoder(nn.Module):
    """Two-layer BiLSTM, then Linear-ReLU-Linear: (s, d) -> (s, d)."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d, width // 2, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, d))

    def forward(self, table: Tensor) -> Tensor:
        return self.head(self.lstm(table)[0])


class PTuning(SoftPrompt):
    """The method's module: `table` (s, d) and `encoder`, both in float32. The encoded soft tokens' states run through
    the layers as tokens do.
    """

    def __init__(self, config: PTuningConfig, d: int, width: int) -> None:
        super().__init__()
        self.num_soft_tokens = config.num_soft_tokens
        self.position = config.position
        self.table = nn.Parameter(torch.randn(config.num_soft_tokens, d))
        self.encoder: nn.Module
        if config.encoder == "lstm":
            self.encoder = LstmEncoder(d, width)
        else:
            self.encoder = nn.Sequential(
                nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, d)
            )

    def input_embeddings(self) -> Tensor:
        return self.encoder(self.table)

    def edits(self) -> Sequence[Edit]:
        return ()


def build(config: PTuningConfig, backbone: Backbone) -> PTuning:
    """The method at its start: a table from N(0, 1), torch's defaults for the encoder."""
    return PTuning(config, backbone.embedding_size, config.width(backbone))


def count(config: PTuningConfig, backbone: Backbone) -> int:
    """s d + w (w + 1) + d (w + 1), and before it: mlp w (d + 1); lstm, two directions of h = w / 2 with four gates
    and torch's two biases a gate: 8 h (d + h + 2) + 8 h (2 h + h + 2)."""
    d, w = backbone.embedding_size, config.width(backbone)
    h = w // 2
    first = w * (d + 1) if config.encoder == "mlp" else 8 * h * (d + h + 2) + 8 * h * (3 * h + 2)
    return config.num_soft_tokens * d + first + (w + d) * (w + 1)


register("p_tuning", MethodSpec(PTuningConfig, build, count))
