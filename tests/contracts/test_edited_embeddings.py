"""The edit `WordEmbeddings`: what a method makes of the instruction's embeddings is what the backbone reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from iapt.model.adapted import AdaptedModel
from iapt.model.edits.base import Edit
from iapt.model.edits.word_embeddings import WordEmbeddings
from iapt.model.method import SoftPrompt
from iapt.model.mixture import RowMixture
from tests.contracts.conftest import SHAPES, Case, batch, build_backbone, build_model, examples

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
OF_THREE = {"num_soft_tokens": 3}


class Shift(SoftPrompt):
    """Two soft tokens, and vectors added to the instruction's first and last token, padding scribbled over."""

    num_soft_tokens, position = 2, "before_instruction"

    def __init__(self, first: float, last: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.prompt, self.first, self.last = (
            nn.Parameter(torch.randn(rows, 32, generator=generator) * scale)
            for rows, scale in ((2, 0.5), (1, first), (1, last))
        )

    def input_embeddings(self) -> Tensor:
        return self.prompt

    def edits(self) -> Sequence[Edit]:
        return (WordEmbeddings(self),)

    def edit_embeddings(self, words: Tensor, mask: Tensor) -> Tensor:
        begins = mask & (mask.cumsum(1) == 1)
        edited = torch.where(begins[..., None], words + self.first, words)
        edited = torch.cat([edited[:, :-1], edited[:, -1:] + self.last], 1)
        return edited.masked_fill(~mask[..., None], 1e3)


def by_hand(model: AdaptedModel, instruction: tuple[int, ...]) -> Tensor:
    """(1, s + n, d): soft tokens and edited instruction of one row without padding."""
    words = model.backbone.embed(torch.tensor([instruction]))
    edited = model.method.edit_embeddings(words, torch.ones(words.shape[:2], dtype=torch.bool))
    return torch.cat([model.method.input_embeddings()[None], edited], 1).detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (1.0, 1.0)], ids=["last", "both"])
def test_loss_and_score_are_the_backbones_own_on_the_edited_embeddings(shape: str, first: float, last: float):
    model, items = AdaptedModel(build_backbone(shape), Shift(first, last)), examples()
    scores, losses, bare = model.score(batch(items)), [], AdaptedModel(build_backbone(shape), None).lm
    for row, item in enumerate(items):
        for number, answer in enumerate((*item.choices, item.response)):
            embeds = torch.cat([by_hand(model, item.instruction), model.backbone.embed(torch.tensor([answer]))], 1)
            log_p = bare(inputs_embeds=embeds).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
            total = log_p[torch.arange(len(answer)), list(answer)].sum()
            if number < len(item.choices):
                torch.testing.assert_close(scores[row, number], total, **TOLERANCE)
            else:
                losses.append(-total)
    torch.testing.assert_close(model.train().loss(batch(items), "sum").detach(), torch.stack(losses).sum(), **TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["greedy", "beams", "several_beams", "samples"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_generation_is_transformers_own_from_the_edited_embeddings(shape: str, options: dict[str, Any]):
    """The last token alone is edited: it enters with the first decoding step, behind the cached prefix."""
    model, bare = AdaptedModel(build_backbone(shape), Shift(0.0, 1.0)), build_backbone(shape).lm
    plain = AdaptedModel(build_backbone(shape), Shift(0.0, 0.0))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    noticed = False
    for item in examples():
        ids, found = torch.tensor([item.instruction]), []
        for generate, inputs in (
            (model.generate, {"input_ids": ids}),
            (bare.generate, {"inputs_embeds": by_hand(model, item.instruction), "pad_token_id": 0}),
            (plain.generate, {"input_ids": ids}),
        ):
            torch.manual_seed(3)
            found.append(generate(**inputs, **options))
        assert torch.equal(found[0], found[1])
        noticed |= not torch.equal(found[0], found[2])
    assert noticed


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_padded_batch_generates_what_its_rows_do(options: dict[str, Any]):
    model, items = AdaptedModel(build_backbone("llama"), Shift(1.0, 1.0)), examples()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, **options}
    alone = torch.cat([model.generate(batch([item]), **options) for item in items])
    assert torch.equal(model.generate(batch(items, extra_left=3), **options), alone)


class Failing(BaseStreamer):  # type: ignore[misc]
    """Is handed the instruction before anything runs."""

    def put(self, value: Tensor) -> None:
        raise RuntimeError("the streamer's")


def test_the_embedding_table_answers_others_as_ever():
    backbone, ids = build_backbone("llama"), torch.tensor([[1, 5, 9, 4], [1, 8, 9, 7]])
    bare = backbone.lm(input_ids=ids).logits
    models = [AdaptedModel(backbone, Shift(1.0, last)) for last in (1.0, 2.0)]
    alone = [AdaptedModel(build_backbone("llama"), Shift(1.0, last)) for last in (1.0, 2.0)]
    for model, other in zip(models, alone, strict=True):
        made = batch(examples())
        assert torch.equal(model.score(made), other.score(made))
        assert torch.equal(model.generate(made, max_new_tokens=3), other.generate(made, max_new_tokens=3))
        assert torch.equal(backbone.lm(input_ids=ids).logits, bare)
    # A decoding that fails before its first token leaves nothing behind.
    with pytest.raises(RuntimeError, match="the streamer's"):
        models[0].generate(batch(examples(2)), max_new_tokens=1, streamer=Failing())
    assert torch.equal(backbone.lm(input_ids=ids).logits, bare)
    for model in models:
        model.detach()
    assert not backbone.embeddings._forward_hooks


def test_methods_that_edit_each_in_their_way_share_a_batch():
    cases = [Case("dept", {**OF_THREE, "rank": 2}), Case("adept", {**OF_THREE, "bottleneck": 4})]
    alone, made, rows = [build_model(case, "llama") for case in cases], batch(examples()), [0, 1, 1, 0, 1]
    mixed = AdaptedModel(build_backbone("llama"), RowMixture([model.method for model in alone]))
    with mixed.method.serving(rows):
        scores, tokens = mixed.score(made), mixed.generate(made, max_new_tokens=4, min_new_tokens=4, num_beams=2)
    for row, adapter in enumerate(rows):
        torch.testing.assert_close(scores[row], alone[adapter].score(made)[row], **TOLERANCE)
        expected = alone[adapter].generate(made, max_new_tokens=4, min_new_tokens=4, num_beams=2)
        assert torch.equal(tokens[row], expected[row])
