"""The contract of every method (numbers as in docs/contract.md): each test runs on every case and shape."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch

from iapt.methods.registry import METHODS
from iapt.model.adapted import AdaptedModel
from iapt.model.checkpoint import load_adapter, save_adapter
from iapt.model.edits.word_embeddings import WordEmbeddings
from iapt.model.method import SoftPrompt
from tests.contracts.conftest import CASES, Case, batch, build_backbone, build_model, examples

# Between two roads to one number, in fp32: sums over the same terms in another order, which differ by 2e-5 at most
# (log-probabilities, a quarter of the cells, two instruction sets). Bit for bit only where one computation is run
# twice on one machine.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
# Tokens have no tolerance, so two roads choose the same ones as long as the likeliest leads by more than rounding. The
# smallest lead in greedy decoding is 2e-4; what is decided by less than this is not compared, or found by test 4.
TIE = 5e-5


def row_losses(model: AdaptedModel, items: list) -> torch.Tensor:
    return torch.stack([model.loss(batch([item]), "sum") for item in items])


def greedy(model: AdaptedModel, items: list, steps: int, **options) -> torch.Tensor:
    ids = model.generate(batch(items), max_new_tokens=steps, min_new_tokens=steps, **options)
    assert ids.shape == (len(items), steps)
    return ids


def log_probabilities(model: AdaptedModel, item, responses: list[list[int]]) -> torch.Tensor:
    """(B, R, V) log p of the tokens at every place of B responses, from one full pass; `model` is an `oracle`."""
    made = batch([item] * len(responses))
    made.response_ids = torch.tensor(responses)
    made.response_mask = torch.ones_like(made.response_ids, dtype=torch.bool)
    log_p = model.engine.response_logits(made).detach().log_softmax(-1)
    log_p[..., 2] = -torch.inf  # eos: min_new_tokens forbids it
    return log_p


def oracle(case: Case, shape: str) -> AdaptedModel:
    """The same model on the one road that never uses a cache."""
    model = build_model(case, shape)
    model.engine.one_pass = True
    return model.train()


def test_every_method_is_covered():
    assert {name for c in CASES for name in (c.method, *c.also)} == set(METHODS)
    for method, name in ((c.method, name) for c in CASES for name in c.also):
        model, other = build_model(Case(method), "llama"), build_model(Case(name), "llama")
        assert type(other.method) is type(model.method)
        assert vars(other.method).keys() == vars(model.method).keys()
        assert not model.adapter_state() | other.adapter_state()


def test_1_only_the_adapter_changes_and_all_of_it_gets_gradient(case: Case, shape: str):
    model = build_model(case, shape)
    if not model.trainable():
        pytest.skip("trains nothing")
    trained = {id(p) for p in model.trainable().values()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    model.loss(batch(examples())).backward()
    for name, parameter in model.trainable().items():
        assert parameter.grad is not None, f"{name} got no gradient"
        assert parameter.grad.abs().sum() > 0, f"{name}'s gradient is zero"
    assert all(p.requires_grad == (id(p) in trained) for p in model.parameters())
    torch.optim.SGD(model.trainable().values(), lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (id(parameter) in trained), name


def test_2_parameter_count_is_the_closed_form(case: Case, shape: str):
    model = build_model(case, shape)
    spec = METHODS[case.method]
    config = spec.config(name=case.method, **case.options)
    counted = sum(p.numel() for p in model.trainable().values())
    assert counted == spec.count(config, build_backbone(shape)) == spec.count(config, model.backbone)


def test_3_padding_and_order_change_nothing(case: Case, shape: str):
    model, items = build_model(case, shape), examples()
    plain, padded = batch(items), batch(items, extra_left=6, extra_right=3)
    torch.testing.assert_close(model.loss(padded), model.loss(plain), **TOLERANCE)
    torch.testing.assert_close(model.score(padded), model.score(plain), **TOLERANCE)
    assert torch.equal(model.generate(padded, max_new_tokens=5, min_new_tokens=5), greedy(model, items, 5))
    order = [3, 0, 4, 1, 2]
    shuffled = batch([items[i] for i in order])
    torch.testing.assert_close(model.score(shuffled), model.score(plain)[order], **TOLERANCE)
    torch.testing.assert_close(model.loss(shuffled), model.loss(plain), **TOLERANCE)


def test_4_cached_greedy_equals_full_recompute(case: Case, shape: str):
    model, items = build_model(case, shape), examples()
    generated, uncached = greedy(model, items, 6), oracle(case, shape)
    for item, row in zip(items, generated.tolist(), strict=True):
        # A token that is the likeliest after those before it, at every place: that is greedy decoding.
        likeliest = log_probabilities(uncached, item, [row])[0].topk(2)
        lead = (likeliest.values[:, 0] - likeliest.values[:, 1]).min()
        assert lead > TIE, "rounding decides here, and in every other test that compares tokens: change the examples"
        assert row == likeliest.indices[:, 0].tolist()


def test_4_cached_beams_equal_full_recompute(case: Case, shape: str):
    model, items, beams, steps = build_model(case, shape), examples(3), 3, 4
    generated, uncached = greedy(model, items, steps, num_beams=beams), oracle(case, shape)
    decided = 0
    for item, row in zip(items, generated.tolist(), strict=True):
        found: list[tuple[float, list[int]]] = [(0.0, [])]
        lead = torch.inf
        for _ in range(steps):
            last = log_probabilities(uncached, item, [[*ids, 3] for _, ids in found])[:, -1].tolist()
            grown = [
                (total + log_p, [*ids, token])
                for (total, ids), row_log_p in zip(found, last, strict=True)
                for token, log_p in enumerate(row_log_p)
            ]
            ranked = sorted(grown, reverse=True)
            found = ranked[:beams]
            lead = min(lead, ranked[beams - 1][0] - ranked[beams][0])
        lead = min(lead, found[0][0] - found[1][0])
        if lead > TIE:
            assert row == found[0][1]
            decided += 1
    assert decided, "rounding decides every row: change the examples"


def test_5_batched_equals_one_by_one(case: Case, shape: str):
    model, items = build_model(case, shape), examples()
    torch.testing.assert_close(model.loss(batch(items), "sum"), row_losses(model, items).sum(), **TOLERANCE)
    alone = torch.cat([model.score(batch([item])) for item in items])
    torch.testing.assert_close(model.score(batch(items)), alone, **TOLERANCE)
    assert torch.equal(greedy(model, items, 5), torch.cat([greedy(model, [item], 5) for item in items]))


def test_5_score_and_loss_agree(case: Case, shape: str, monkeypatch: pytest.MonkeyPatch):
    """The prefix that `score` continues from and the single pass of `loss` are two roads to one number."""
    model, items = build_model(case, shape), examples()
    if model.method.scores_labels:
        pytest.skip("has scores of its own")
    monkeypatch.setattr(model.method, "adjust_scores", lambda scores: scores)  # the loss knows nothing of it
    monkeypatch.setattr(model.method, "objective", lambda model, batch: None)  # nor the scores of this
    model.train()
    for choice in range(3):
        chosen = batch(items)
        chosen.response_ids, chosen.response_mask = (
            chosen.choice_ids[:, choice],
            chosen.choice_mask[:, choice],
        )
        torch.testing.assert_close(model.loss(chosen, "sum"), -model.score(batch(items))[:, choice].sum(), **TOLERANCE)


def test_6_saved_and_loaded_gives_the_same_logits(case: Case, shape: str, tmp_path: Path):
    model = build_model(case, shape)
    save_adapter(tmp_path, model.adapter_state(), {"any": "thing"})
    other = build_model(case, shape)
    other.load_adapter_state({name: torch.zeros_like(t) for name, t in other.adapter_state().items()})
    tensors, meta = load_adapter(tmp_path)
    assert meta["any"] == "thing"
    assert torch.equal(other.score(batch(examples())), model.score(batch(examples()))) != bool(tensors)
    other.load_adapter_state(tensors)
    assert torch.equal(other.score(batch(examples())), model.score(batch(examples())))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]


def answers(model: AdaptedModel, made, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Everything the method answers during one training pass."""
    seen: list[torch.Tensor] = []

    def watch(name: str) -> None:
        if (answer := getattr(model.method, name, None)) is None:
            return

        def watched(*args):
            found = answer(*args)
            parts = [found[part] for part in sorted(found)] if isinstance(found, dict) else found
            parts = parts if isinstance(parts, (list, tuple)) else (parts,)
            seen.extend(part.detach().clone() for part in parts if part is not None)
            return found

        monkeypatch.setattr(model.method, name, watched)

    for name in ("input_embeddings", "forward", "keys_values", "edit_embeddings", "scale"):
        watch(name)
    model.train()
    model.loss(made)
    monkeypatch.undo()
    return seen


def test_7_no_soft_token_sees_the_response(case: Case, shape: str, monkeypatch: pytest.MonkeyPatch):
    """Nor does any edit of the instruction's embeddings, or any vector that scales."""
    model = build_model(case, shape)
    if not isinstance(model.method, SoftPrompt):
        pytest.skip("has no soft tokens")
    made, other = batch(examples()), batch(examples())
    other.response_ids = (other.response_ids + 17) % 60 + 3
    assert not torch.equal(made.response_ids, other.response_ids)
    first, second = answers(model, made, monkeypatch), answers(model, other, monkeypatch)
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # The same probe must notice a changed instruction in every method that reads it.
    other.instruction_ids = torch.where(made.instruction_mask, (made.instruction_ids + 5) % 60 + 3, 0)
    changed = any(not torch.equal(a, b) for a, b in zip(first, answers(model, other, monkeypatch), strict=True))
    # Edited embeddings are the instruction's, whatever the edit read of it.
    assert changed == any(e.reads != "nothing" or isinstance(e, WordEmbeddings) for e in model.method.edits())


def overwrite_soft(model: AdaptedModel, layer, args, kwargs):
    """A hook: noise in the soft columns of a pass that holds them."""
    plan, hidden = model.engine.hooks.plan, args[0].clone()
    if plan is None or plan.slots is None:
        return None
    hidden[torch.arange(len(hidden))[:, None], plan.slots] = 3 * torch.randn(model.backbone.hidden_size)
    return (hidden, *args[1:]), kwargs


@pytest.mark.parametrize("shape", ["llama", "gemma2", "gpt2"])
def test_7_no_token_sees_soft_tokens_where_they_are_hidden(shape: str):
    """What stands in the soft columns of a layer in which they are hidden must not matter."""
    models = [build_model(case, shape) for case in CASES if shape not in case.impossible]
    hiding = [m for m in models if getattr(m.method, "masked_layers", None)]
    assert {m.method.position for m in hiding} == {"before_instruction", "after_instruction"}
    assert {frozenset({0}), frozenset({1}), frozenset({0, 2})} <= {m.method.masked_layers for m in hiding}
    for model in hiding:
        made, steps = batch(examples()), 4
        expected = model.score(made), model.loss(made), greedy(model, examples(), steps)
        for layer in model.method.masked_layers:
            model.backbone.layers[layer].register_forward_pre_hook(partial(overwrite_soft, model), with_kwargs=True)
        torch.testing.assert_close(model.score(made), expected[0], **TOLERANCE)
        torch.testing.assert_close(model.loss(made), expected[1], **TOLERANCE)
        assert torch.equal(greedy(model, examples(), steps), expected[2])


def test_8_activation_checkpointing_changes_nothing(case: Case, shape: str):
    plain, saving = build_model(case, shape), build_model(case, shape, activation_checkpointing=True)
    losses = [model.train().loss(batch(examples())) for model in (plain, saving)]
    torch.testing.assert_close(*losses, **TOLERANCE)
    if plain.trainable():
        sum(losses).backward()
    for (name, a), b in zip(plain.trainable().items(), saving.trainable().values(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}", **TOLERANCE)


def test_10_bf16_runs_and_stays_finite(case: Case, shape: str):
    model = build_model(case, shape, dtype=torch.bfloat16, precision="bf16")
    model.train()
    trained = list(model.trainable().values())
    optimizer = torch.optim.AdamW(trained, lr=1e-3) if trained else None
    for _ in range(3):
        loss = model.loss(batch(examples()))
        if optimizer:
            loss.backward()
            optimizer.step()
    assert loss.isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.trainable().values())
    assert model.score(batch(examples())).isfinite().all()
    greedy(model, examples(), 3)


def test_11_switched_off_it_is_the_bare_backbone(case: Case, shape: str):
    model = build_model(case, shape)
    bare = AdaptedModel(build_backbone(shape), None)
    made = batch(examples())
    adapted = model.score(made)
    with model.disabled():
        assert torch.equal(model.score(made), bare.score(made))
        assert torch.equal(model.loss(made), bare.loss(made))
        assert torch.equal(greedy(model, examples(), 4), greedy(bare, examples(), 4))
    assert torch.equal(model.score(made), adapted)
    # A method without tensors of its own has nothing to change scores with.
    assert ((adapted - bare.score(made)).abs().max() > 1e-3) == bool(model.adapter_state())
    # And the bare model is transformers' own forward pass.
    item = examples()[4]
    ids = torch.tensor([[*item.instruction, *item.choices[2]]])
    log_p = bare.lm(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum(1)
    torch.testing.assert_close(bare.score(batch([item]))[0, 2], log_p[len(item.instruction) - 1 :].sum())


def test_hooks_leave_other_users_of_the_backbone_alone(case: Case):
    model = build_model(case, "llama")
    if not isinstance(model.method, SoftPrompt):
        pytest.skip("weight-space methods change the backbone by design")
    ids = torch.tensor([[1, 5, 9, 4]])
    bare = build_backbone("llama").lm(input_ids=ids).logits
    model.score(batch(examples()))
    model.train()
    model.loss(batch(examples()))
    assert torch.equal(model.lm(input_ids=ids).logits, bare)
    model.detach()
    assert not any(layer._forward_pre_hooks for layer in model.backbone.layers)


def test_deepcopy_of_examples_is_not_needed():
    """Verbs leave their batch as they found it."""
    model, made = build_model(CASES[-1], "llama"), batch(examples())
    kept = copy.deepcopy(made)
    model.loss(made)
    model.score(made)
    model.generate(made, max_new_tokens=2)
    assert all(torch.equal(getattr(made, f), getattr(kept, f)) for f in made.__dataclass_fields__)
