"""POST: its objective against a slow computation, what it may look at, and which sources it takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from iapt.config.errors import ConfigError, UserError
from iapt.methods.post import Post, PostConfig
from iapt.methods.registry import METHODS
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import TINY_DIR, Backbone
from iapt.runs import experiment
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples
from tests.methods.test_panda import slow_logits
from tests.test_experiment import SHAPE, config
from tests.test_transfer import small

WIDER = {"backbone": {"shape": {**SHAPE, "hidden_size": 48, "num_hidden_layers": 3}}}


def taught(**settings: Any) -> tuple[AdaptedModel, AdaptedModel]:
    """A target on a llama and its source, on a gpt2 of the same vocabulary."""
    torch.manual_seed(3)
    backbone = build_backbone("llama")
    method = METHODS["post"].build(PostConfig(name="post", **{"num_soft_tokens": 3, **settings}), backbone)
    source = build_model(Case("prompt_tuning", {"num_soft_tokens": 2}), "gpt2", seed=5)
    method.learn_from(source, backbone)
    return AdaptedModel(backbone, method), source


@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 2.0), (1.0, 1.5), (0.0, 1.0)])
@torch.no_grad()
def test_the_objective_is_the_papers(alpha: float, temperature: float):
    model, source = taught(alpha=alpha, temperature=temperature)
    total, tokens = 0.0, 0
    for item in examples():
        z_t, z_s = (slow_logits(m.backbone, m.method.prompt, item).double() for m in (model, source))
        b_t, b_s = (slow_logits(m.backbone, None, item).double() for m in (model, source))
        for place in range(len(item.response)):
            for share, theirs, ours in ((alpha, z_s - b_s, z_t - b_t), (1 - alpha, z_s, z_t)):
                p, q = ((z[place] / temperature).exp() for z in (theirs, ours))
                p, q = p / p.sum(), q / q.sum()
                total += share * temperature**2 * float(sum(p * (p / q).log()))
            tokens += 1
    for training in (True, False):  # the dev loss is the same
        assert float(model.train(training).loss(batch(examples()))) == pytest.approx(total / tokens, rel=1e-4)


def test_no_label_is_looked_at():
    """Beyond the earlier tokens of the response, which later positions see: the last one is no input of anything."""
    model, _ = taught()
    made, other = batch(examples()), batch(examples())
    last = other.response_mask.sum(1) - 1
    other.response_ids[torch.arange(len(last)), last] = 60
    assert not torch.equal(made.response_ids, other.response_ids)
    assert torch.equal(model.loss(made), model.loss(other))


def test_a_perfect_pupil_has_nothing_to_learn():
    model, _ = taught()
    method = model.method
    assert isinstance(method, Post)
    twin = AdaptedModel(build_backbone("llama"), METHODS["prompt_tuning"].build(PostConfig(), build_backbone("llama")))
    assert twin.method is not None
    twin.method.prompt = torch.nn.Parameter(method.prompt.detach().clone())
    twin.method.num_soft_tokens = 3
    method.learn_from(twin, model.backbone)
    assert model.loss(batch(examples())).item() == pytest.approx(0, abs=1e-5)


def test_training_brings_the_target_nearer_to_its_source():
    model, _ = taught()
    made, optimizer = batch(examples()), torch.optim.Adam(model.trainable().values(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.train().loss(made)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_source_is_frozen_and_no_part_of_the_adapter():
    model, source = taught()
    before = {name: t.clone() for name, t in source.adapter_state().items()}
    model.train().loss(batch(examples())).backward()
    assert not source.training
    assert all(p.grad is None for p in source.parameters())
    assert list(model.trainable()) == list(model.adapter_state()) == ["prompt"]
    assert not {id(p) for p in source.parameters()} & {id(p) for p in model.parameters()}
    assert all(torch.equal(t, before[name]) for name, t in source.adapter_state().items())


def test_another_vocabulary_is_refused():
    model, source = taught()
    method = model.method
    assert isinstance(method, Post)
    source.lm.config.vocab_size = 70
    with pytest.raises(UserError, match="method.source = None: its backbone has 70 tokens, this one 67"):
        method.learn_from(source, model.backbone)
    source.lm.config.vocab_size = 67
    source.backbone = Backbone("other", source.lm, AutoTokenizer.from_pretrained(TINY_DIR))
    with pytest.raises(UserError, match="its backbone's tokenizer is not this one's: token .* is '.*' there"):
        method.learn_from(source, model.backbone)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "method.source = null: "),
        ({"source": "x", "alpha": 1.5}, "method.alpha = 1.5: a share, 0 to 1"),
        ({"source": "x", "temperature": 0.0}, "method.temperature = 0.0: must be above 0"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        small("post", settings)


def test_without_a_source_there_is_nothing_to_learn_from():
    method = METHODS["post"].build(PostConfig(name="post"), build_backbone("llama"))
    with pytest.raises(UserError, match="method.source = None: nothing to learn from"):
        AdaptedModel(build_backbone("llama"), method).loss(batch(examples()))


def test_a_run_learns_from_a_run_on_another_backbone_and_is_scored_without_it(tmp_path: Path):
    source, run = tmp_path / "source", tmp_path / "run"
    experiment.run(small(toy="entailment"), source)
    settings = small("post", {"source": str(source), "num_soft_tokens": 4}, toy="entailment", **WIDER)
    parts = experiment.build(settings, to_train=True)
    state = torch.get_rng_state()
    parts.model.loss(batch(parts.items["train"][:2]))
    assert torch.equal(torch.get_rng_state(), state)  # reading the source draws nothing
    learned = parts.model.method._source[0]
    assert (learned.backbone.hidden_size, parts.backbone.hidden_size) == (32, 48)
    assert learned.adapter_state()["prompt"].shape == (4, 32)
    summary = experiment.run(settings, run)
    shutil.rmtree(source)
    assert experiment.evaluate(run, tmp_path / "again", {}).test == summary.test


def test_sources_that_do_not_fit(tmp_path: Path):
    experiment.run(config("entailment", "bitfit", zero_shot=False), tmp_path / "weights")
    experiment.run(small(toy="entailment"), tmp_path / "prompt")
    larger = {"backbone": {"shape": {**SHAPE, "vocab_size": 1030}}}
    for name, changes, words in (
        ("weights", {}, "holds an adapter of method bitfit, not a soft prompt's"),
        ("prompt", larger, "its backbone has 1024 tokens, this one 1030"),
        ("nowhere", {}, "expected a run or adapter folder"),
    ):
        settings = small("post", {"source": str(tmp_path / name)}, **changes)
        with pytest.raises(UserError, match=rf"^method.source = {tmp_path / name}: {words}"):
            experiment.run(settings, tmp_path / f"run-{name}")
