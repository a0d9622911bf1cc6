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
    """One prefix that every choice continues, or a row a choice: with `one_pass`, or where layers are recomputed."""
    gradients = []
    for road in ("prefix", "one_pass", "checkpointing"):
        model = build_model(case, shape, activation_checkpointing=road == "checkpointing").train()
        model.engine.one_pass = road == "one_pass"
        found = model.likelihoods(batch(examples()))
        assert found.shape == (5, 3)
        if model.trainable():
            (found * torch.arange(15).view(5, 3).cos()).sum().backward()
        gradients.append((found.detach(), {n: p.grad for n, p in model.trainable().items() if p.grad is not None}))
    expected, by_name = gradients[0]
    for found, others in gradients[1:]:
        torch.testing.assert_close(found, expected, **TOLERANCE)
        assert others.keys() == by_name.keys()
        for name, gradient in by_name.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
