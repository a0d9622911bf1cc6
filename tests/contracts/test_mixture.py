"""Invariant 13: a mixed batch of adapters equals each adapter alone; and what a mixture refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iapt.config.errors import UserError
from iapt.data.batch import Batch
from iapt.model.adapted import AdaptedModel
from iapt.model.method import SoftPrompt
from iapt.model.mixture import RowMixture
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
ROWS = [0, 1, 1, 0, 1]
PROMPT = Case("prompt_tuning", {"num_soft_tokens": 4})


def row_losses(model: AdaptedModel, made: Batch) -> Tensor:
    """(B,): each row's loss, all of them from one pass over the batch."""
    logits = model.engine.response_logits(made).transpose(1, 2)
    return (F.cross_entropy(logits, made.response_ids, reduction="none") * made.response_mask).sum(1)


def test_13_a_mixed_batch_equals_each_adapter_alone(case: Case, shape: str):
    alone = [build_model(case, shape), build_model(case, shape, seed=12)]
    adapters = [model.method for model in alone]
    if not all(isinstance(adapter, SoftPrompt) for adapter in adapters):
        pytest.skip("only prompt-space adapters share a batch so far")
    if adapters[0].scores_labels:
        pytest.skip("scores choices in its own way")
    mixed, made = AdaptedModel(build_backbone(shape), RowMixture(adapters)), batch(examples(len(ROWS)))

    def of_each(answers: list[Tensor]) -> Tensor:
        return torch.stack([answers[adapter][row] for row, adapter in enumerate(ROWS)])

    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    with mixed.method.serving(ROWS):
        scores, greedy = mixed.score(made), mixed.generate(made, **options)
        beams = mixed.generate(made, num_beams=3, **options)
        losses = row_losses(mixed, made)
        losses.sum().backward()
    scores_alone = [model.score(made) for model in alone]
    assert not torch.allclose(*scores_alone, **TOLERANCE)
    torch.testing.assert_close(scores, of_each(scores_alone), **TOLERANCE)
    torch.testing.assert_close(losses, of_each([row_losses(model, made) for model in alone]), **TOLERANCE)
    assert torch.equal(greedy, of_each([model.generate(made, **options) for model in alone]))
    assert torch.equal(beams, of_each([model.generate(made, num_beams=3, **options) for model in alone]))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixed.trainable().values())


def test_adapters_of_different_kinds_and_sizes_share_a_batch():
    before = {"position": "before_instruction"}
    cases = [Case("idpg", {"num_soft_tokens": 4, "phm_n": 4, **before}), Case("iapt", {"bottleneck": 8, **before})]
    alone, made = [build_model(case, "llama") for case in cases], batch(examples(len(ROWS)))
    mixed = AdaptedModel(build_backbone("llama"), RowMixture([model.method for model in alone]))
    with mixed.method.serving(ROWS):
        scores = mixed.score(made)
    expected = torch.stack([alone[adapter].score(made)[row] for row, adapter in enumerate(ROWS)])
    torch.testing.assert_close(scores, expected, **TOLERANCE)


def test_what_does_not_fit_is_refused_with_a_word():
    five = build_model(Case("prompt_tuning", {"num_soft_tokens": 5}), "llama").method
    four = build_model(PROMPT, "llama").method
    with pytest.raises(UserError, match=r"adapters\[1\].num_soft_tokens = 5: .* adapters\[0\] has 4"):
        RowMixture([four, five])
    with pytest.raises(UserError, match="needs one at least"):
        RowMixture([])
    mixture = RowMixture([four])
    mixed = AdaptedModel(build_backbone("llama"), mixture)
    with pytest.raises(ValueError, match="RowMixture.serving"):
        mixed.score(batch(examples()))
    with pytest.raises(ValueError, match=r"adapters \[1\]: there are 1"), mixture.serving([0, 1]):
        pass
    for rows, error in (([0, 0], RuntimeError), ([0], ValueError)):
        for verb in (mixed.score, mixed.loss, mixed.generate):
            with pytest.raises(error), mixture.serving(rows):
                verb(batch(examples(5)))
    assert mixture.rows is None


def test_edits_that_do_not_fit_are_refused_with_a_word():
    def mixture(*cases: Case) -> RowMixture:
        return RowMixture([build_model(case, "llama").method for case in cases])

    low, high = (Case("lpt", {"num_soft_tokens": 4, "layer": layer}) for layer in (1, 2))
    with pytest.raises(UserError, match=r"adapters\[1\].masked_layers = frozenset\({0, 1}\): adapters of one batch"):
        mixture(low, high)
    with pytest.raises(UserError, match=r"adapters\[1\].masked_layers = frozenset\(\{0\}\): .* has frozenset\(\)"):
        mixture(PROMPT, low)
    idpg = [Case("idpg", {"num_soft_tokens": 4, "phm_n": 4, "layers": layers}) for layers in ("multi", "single")]
    with pytest.raises(UserError, match=r"adapters\[2\].reads = 'encoding': .* adapters\[1\] has 'layers'"):
        mixture(PROMPT, *idpg)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prefix_tuning", {"form": "keys_values", "reparameterization": "none"}),
        ("prefix_tuning", {"form": "states", "reparameterization": "none"}),
        ("iapt", {"bottleneck": 8, "position": "before_instruction", "output_start": "gated"}),
        ("dept", {"rank": 2}),
    ],
)
def test_rows_whose_adapter_lacks_an_edit_are_left_alone(method: str, options: dict[str, Any]):
    alone = [build_model(case, "llama") for case in (PROMPT, Case(method, {"num_soft_tokens": 4, **options}))]
    mixed, made = AdaptedModel(build_backbone("llama"), RowMixture([m.method for m in alone])), batch(examples(5))
    with mixed.method.serving(ROWS):
        scores, tokens = mixed.score(made), mixed.generate(made, max_new_tokens=4, min_new_tokens=4, num_beams=2)
    for row, adapter in enumerate(ROWS):
        expected = alone[adapter].generate(made, max_new_tokens=4, min_new_tokens=4, num_beams=2)
        torch.testing.assert_close(scores[row], alone[adapter].score(made)[row], **TOLERANCE)
        assert torch.equal(tokens[row], expected[row])
