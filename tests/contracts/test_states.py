"""What methods with scores of their own read off the engine and the model, for every method and shape."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.conftest import Case, batch, build_model, examples

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("training", [False, True])
def test_the_instructions_last_state_is_what_predicts_the_response(case: Case, shape: str, training: bool):
    model = build_model(case, shape, activation_checkpointing=training).train(training)
    made, other = batch(examples()), batch(examples(), extra_left=3)
    states = model.engine.instruction_states(made)
    logits = model.lm.get_output_embeddings()(states)
    if cap := getattr(model.lm.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, model.engine.response_logits(made)[:, 0], **TOLERANCE)
    # It sees no response, and no padding.
    other.response_ids = (other.response_ids + 17) % 60 + 3
    torch.testing.assert_close(model.engine.instruction_states(other), states, **TOLERANCE)


def test_likelihoods_have_the_same_gradient_on_both_roads(case: Case, shape: str):
    """One prefix that every choice continues, or, where activation checkpointing allows no cache, a row a choice."""
    gradients = []
    for checkpointing in (False, True):
        model = build_model(case, shape, activation_checkpointing=checkpointing).train()
        found = model.likelihoods(batch(examples()))
        assert found.shape == (5, 3)
        if model.trainable():
            (found * torch.arange(15).view(5, 3).cos()).sum().backward()
        gradients.append((found.detach(), {n: p.grad for n, p in model.trainable().items() if p.grad is not None}))
    torch.testing.assert_close(gradients[1][0], gradients[0][0], **TOLERANCE)
    assert gradients[0][1].keys() == gradients[1][1].keys()
    for name, gradient in gradients[0][1].items():
        torch.testing.assert_close(
            gradients[1][1][name], gradient, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
