"""PANDA: its objective against a slow computation, its weight, and where teacher and student come from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from iapt.config.errors import ConfigError
from iapt.data.batch import Encoded
from iapt.methods.panda import Panda, PandaConfig
from iapt.methods.registry import METHODS
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import Backbone
from iapt.model.checkpoint import load_adapter
from iapt.runs import experiment
from tests.contracts.conftest import batch, build_backbone, examples
from tests.test_transfer import small


def panda(seed: int = 3, **settings: Any) -> Panda:
    torch.manual_seed(seed)
    config = PandaConfig(name="panda", **{"num_soft_tokens": 3, "init_std": 0.5, **settings})
    return METHODS["panda"].build(config, build_backbone("llama"))


def slow_logits(backbone: Backbone, prompt: Tensor | None, item: Encoded) -> Tensor:
    """(R, V): one row through transformers alone, [prompt, instruction, response but for its last token]."""
    words = backbone.lm.get_input_embeddings()(torch.tensor([*item.instruction, *item.response[:-1]]))
    embeds = words if prompt is None else torch.cat([prompt, words])
    return backbone.lm(inputs_embeds=embeds[None]).logits[0, -len(item.response) :]


def test_the_objective_is_the_papers():
    method, backbone, items = panda(weight=0.7), build_backbone("llama"), examples()
    with torch.no_grad():
        method.teacher += 0.5 * method.prompt
    model = AdaptedModel(backbone, method)
    total, plain, tokens = 0.0, 0.0, 0
    student, teacher = method.prompt.detach(), method.teacher
    similar = float(student.mean(0) @ teacher.mean(0) / (student.mean(0).norm() * teacher.mean(0).norm()))
    assert 0.1 < similar < 0.99
    for item in items:
        own, wanted = (slow_logits(backbone, prompt, item) for prompt in (student, teacher))
        for position, token in enumerate(item.response):
            surprise = float(own[position].logsumexp(0) - own[position, token])
            apart = float(((own[position] - wanted[position]) ** 2).sum() / own.shape[1])
            plain += surprise
            total += surprise + 0.7 * similar * apart
            tokens += 1
    assert total > 1.05 * plain
    model.train()
    assert model.loss(batch(items)).item() == pytest.approx(total / tokens, rel=1e-4)
    model.eval()
    assert model.loss(batch(items)).item() == pytest.approx(plain / tokens, rel=1e-4)


def test_the_teacher_stays_and_takes_no_part_afterwards():
    method = panda()
    model, made = AdaptedModel(build_backbone("llama"), method), batch(examples())
    before, scores = method.teacher.clone(), model.score(made)
    model.train().loss(made).backward()
    assert list(model.trainable()) == ["prompt"]
    assert method.teacher.grad is None
    assert torch.equal(method.teacher, before)
    assert method.input_embeddings() is method.prompt
    method.teacher += 1
    assert torch.equal(model.eval().score(made), scores)


def test_the_weight_follows_likeness_and_schedule():
    method = panda(weight=2.0)
    method.teacher.copy_(method.prompt.detach() + 5)
    expected = F.cosine_similarity(method.prompt.mean(0), method.teacher.mean(0), dim=0)
    torch.testing.assert_close(method.distillation_weight(), 2 * expected.detach())
    assert not method.distillation_weight().requires_grad
    method.teacher.copy_(-method.prompt.detach())
    assert float(method.distillation_weight()) == 0  # a task unlike ours is no teacher, not a warning example
    method.config.adaptive = False
    assert float(method.distillation_weight()) == 2


def test_warmup_and_decay_survive_an_interruption():
    method = panda(weight=1.0, adaptive=False, schedule="warmup_decay", warmup_ratio=0.2)
    method.on_train_start(10)
    weights = []
    for step in range(1, 11):
        weights.append(float(method.distillation_weight()))
        method.after_step(step)
    assert weights == pytest.approx([0.5, 1.0, *(k / 8 for k in range(8, 0, -1))])
    again = panda(weight=1.0, adaptive=False, schedule="warmup_decay", warmup_ratio=0.2)
    method.after_step(7)
    again.on_train_start(10)
    again.load_training_state(method.training_state())
    assert float(again.distillation_weight()) == pytest.approx(3 / 8)
    steady = panda(weight=1.0, adaptive=False)
    steady.on_train_start(10)
    steady.after_step(9)
    assert float(steady.distillation_weight()) == 1


def test_the_student_starts_as_prompt_tuning_does():
    torch.manual_seed(3)
    spec = METHODS["prompt_tuning"]
    alike = spec.build(spec.config(name="prompt_tuning", num_soft_tokens=3), build_backbone("llama"))
    method = panda()
    assert torch.equal(method.prompt, alike.prompt)
    source = {"prompt": torch.ones(3, 32), "teacher": torch.zeros(3, 32)}  # of a panda adapter: its student teaches
    fresh = method.adopt(source)
    assert torch.equal(fresh["teacher"], source["prompt"])
    assert torch.equal(fresh["prompt"], method.prompt)
    moved = panda(student_start="source").adopt(source)
    assert torch.equal(moved["prompt"], source["prompt"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "method.init_from = null: "),
        ({"init_from": "x", "warmup_ratio": 1.5}, "method.warmup_ratio = 1.5: "),
        ({"init_from": "x", "weight": -1.0}, "method.weight = -1.0: must be at least 0"),
        ({"init_from": "x", "student_start": "far"}, "allowed are fresh, source"),
        ({"init_from": "x", "init": "text"}, "method.init_text = null"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        small("panda", settings)


def test_a_run_learns_from_another_and_is_scored_without_it(tmp_path: Path):
    source, run = tmp_path / "source", tmp_path / "run"
    experiment.run(small(method={"num_soft_tokens": 4}, toy="entailment"), source)
    config = small("panda", {"num_soft_tokens": 4, "init_from": str(source)})
    parts = experiment.build(config, to_train=True)
    taught = experiment.build(small(toy="entailment", method={"init_from": str(source)}), to_train=True)
    assert torch.equal(parts.model.method.teacher, taught.model.method.prompt)
    summary = experiment.run(config, run)
    assert summary.init_from["method"] == "prompt_tuning"
    second = experiment.build(small("panda", {"num_soft_tokens": 4, "init_from": str(run)}), to_train=True)
    assert torch.equal(second.model.method.teacher, load_adapter(run)[0]["prompt"])
    shutil.rmtree(source)
    assert experiment.evaluate(run, tmp_path / "again", {}).test == summary.test
