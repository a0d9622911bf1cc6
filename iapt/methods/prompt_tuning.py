"""Prompt tuning (Lester et al., EMNLP 2021): one trained matrix of soft tokens at the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iapt.config.errors import UserError
from iapt.config.fields import at_least, choice
from iapt.config.method import SizeKnob, SoftPromptConfig
from iapt.methods.registry import MethodSpec, register
from iapt.model.backbone import Backbone
from iapt.model.edits.base import Edit
from iapt.model.method import SoftPrompt


@dataclass
class PromptTuningConfig(SoftPromptConfig):
    """The settings of prompt tuning. `init` says where P starts: `random` draws from N(0, `init_std`^2), `vocabulary`
    copies the embeddings of random tokens, and `text` copies the embeddings of `init_text`, repeated or cut to
    `num_soft_tokens`.
    """

    learning_rate: float = at_least(3e-2, 0)
    num_soft_tokens: int = at_least(20, 1)
    position: str = choice("before_instruction", "before_instruction", "after_instruction")
    init: str = choice("vocabulary", "random", "vocabulary", "text")
    init_std: float = at_least(0.02, 0)
    init_text: str | None = None

    def problems(self) -> list[str]:
        if self.init == "text" and not self.init_text:
            return ["method.init_text = null: method.init = text copies the embeddings of method.init_text; give one"]
        return []

    def size_knob(self) -> SizeKnob:
        return SizeKnob("num_soft_tokens")


class PromptTuning(SoftPrompt):
    """P (s, d) in float32, given as input embeddings; its states run through the layers as tokens do."""

    def __init__(self, start: Tensor, position: str) -> None:
        super().__init__()
        self.num_soft_tokens = len(start)
        self.position = position
        self.prompt = nn.Parameter(start.float())

    def input_embeddings(self) -> Tensor:
        return self.prompt

    def edits(self) -> Sequence[Edit]:
        return ()


def random_tokens(count: int, backbone: Backbone) -> Tensor:
    """(count, d): the embeddings of random tokens, on the CPU."""
    return _embeddings(torch.randint(len(backbone.tokenizer), (count,)), backbone)


def _embeddings(ids: Tensor, backbone: Backbone) -> Tensor:
    return backbone.embed(ids.to(backbone.embeddings.weight.device)).detach().cpu()


def draw_start(config: PromptTuningConfig, backbone: Backbone) -> Tensor:
    """The soft tokens (s, d) at their start. Raises UserError if `init_text` has no tokens."""
    s = config.num_soft_tokens
    if config.init == "random":
        return torch.randn(s, backbone.embedding_size) * config.init_std
    if config.init == "vocabulary":
        return random_tokens(s, backbone)
    ids = torch.tensor(backbone.tokenizer.encode(config.init_text, add_special_tokens=False), dtype=torch.long)
    if not len(ids):
        raise UserError(f"method.init_text = {config.init_text!r}: the tokenizer finds no token in it")
    return _embeddings(ids.repeat(s // len(ids) + 1)[:s], backbone)


def build(config: PromptTuningConfig, backbone: Backbone) -> PromptTuning:
    """Raises UserError as `draw_start` does."""
    return PromptTuning(draw_start(config, backbone), config.position)


def count(config: PromptTuningConfig, backbone: Backbone) -> int:
    """s e, e the width of a token's embedding, which is d in nearly all models."""
    return config.num_soft_tokens * backbone.embedding_size


register("prompt_tuning", MethodSpec(PromptTuningConfig, build, count))
