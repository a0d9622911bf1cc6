"""ID-SPAM: input-dependent soft prompts through self-attention (Muppidi et al., ACL 2025 short, arXiv 2506.05629).

One learned single-head self-attention over the instruction's states right before layer k, pooled to one vector, from
which a bottleneck MLP writes the soft tokens; they enter at that one layer and run on as tokens do. The paper gives the
structure and the choice of k; widths, biases and scaling in these formulas are inferred (I):

    A = softmax(Q K^T / sqrt(a)) V,      Q, K, V = h W_Q, h W_K, h W_V     (n, a) each, no biases
    c = mean of A's n rows
    P = reshape(W_2 relu(W_1 c + b_1) + b_2, (s, d))

Every instruction token attends to every other one, whatever the backbone's own mask; padding and response are left
out. The paper reads the tokens' embeddings at k = 0: on backbones that add position embeddings to those, here they are
included, for P as for the tokens (I). The authors' encoder is square, a = d; on a large backbone that is most of the
parameters (50M of LLaMA-2 7B), so a is a setting and smaller by default (I).

Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.config.fields import at_least, choice
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.edits.layer_input import LayerInput
from iapt.model.edits.masked_layers import MaskedLayers
from iapt.model.method import SoftPrompt
from iapt.nn.norm import cast_and_normalize
from iapt.nn.pooling import mean_pool


@dataclass
class IdSpamConfig(SoftPromptConfig):
    """The settings of ID-SPAM. `layer` is k, the number of layers that run before the soft tokens enter.
    `attention_width` is a; null stands for the backbone's width. `bottleneck` is the MLP's inner width, the budget
    knob.
    """

    learning_rate: float = at_least(3e-3, 0)
    num_soft_tokens: int = at_least(10, 1)
    position: str = choice("before_instruction", "before_instruction", "after_instruction")
    layer: int = at_least(0, 0)
    attention_width: int | None = at_least(64, 1)
    bottleneck: int = at_least(64, 1)
    # Residual streams differ in scale between backbones and layers by orders of magnitude.
    normalize_input: bool = True

    def size_knob(self) -> SizeKnob:
        return SizeKnob("bottleneck")


class IdSpam(SoftPrompt):
    """Its parts: `queries`, `keys`, `values` (d -> a), `down` (a -> m) and `up` (m -> s d), all at `layer`."""

    def __init__(self, config: IdSpamConfig, width: int) -> None:
        super().__init__()
        self.num_soft_tokens = config.num_soft_tokens
        self.position = config.position
        self.layer = config.layer
        self.masked_layers = frozenset(range(config.layer))
        self.normalize_input = config.normalize_input
        inner = config.attention_width or width
        self.queries, self.keys, self.values = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.down = nn.Linear(inner, config.bottleneck)
        self.up = nn.Linear(config.bottleneck, config.num_soft_tokens * width)

    def edits(self) -> Sequence[Edit]:
        return (LayerInput(self), MaskedLayers(self)) if self.masked_layers else (LayerInput(self),)

    def forward(self, layer: int, states: Tensor, mask: Tensor, previous: Tensor) -> Tensor | None:
        if layer != self.layer:
            return None
        states = cast_and_normalize(states, self.down.weight, self.normalize_input)
        attended = F.scaled_dot_product_attention(
            self.queries(states), self.keys(states), self.values(states), attn_mask=mask[:, None]
        )
        soft = self.up(self.down(mean_pool(attended, mask)).relu()).unflatten(-1, (self.num_soft_tokens, -1))
        # At the input `previous` is the position embeddings; further up, what nothing below has seen.
        return soft if self.layer else previous + soft


def build(config: IdSpamConfig, backbone: Backbone) -> IdSpam:
    """Build the method with torch's defaults for all maps. Raises UserError if the backbone has no layer `layer`."""
    if config.layer >= backbone.num_layers:
        raise UserError(
            f"method.layer = {config.layer}: backbone {backbone.name} has {backbone.num_layers} layers, allowed are 0 "
            f"to {backbone.num_layers - 1}"
        )
    return IdSpam(config, backbone.hidden_size)


def count(config: IdSpamConfig, backbone: Backbone) -> int:
    """3 d a + m (a + 1) + s d (m + 1)."""
    d, m = backbone.hidden_size, config.bottleneck
    a = config.attention_width or d
    return 3 * d * a + m * (a + 1) + config.num_soft_tokens * d * (m + 1)


register("id_spam", MethodSpec(IdSpamConfig, build, count))
