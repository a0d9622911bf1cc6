"""PTEC: its start, its equations against a slow computation, what it refuses, and a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import iapt
from iapt.config.errors import ConfigError, UserError
from iapt.config.schema import Config
from iapt.methods.budget import fit_to_budget
from iapt.methods.ptec import PtecConfig
from iapt.methods.registry import METHODS, spec_of
from iapt.methods.settings import load_config
from iapt.model.adapted import AdaptedModel
from iapt.model.mixture import RowMixture
from iapt.runs import experiment
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples
from tests.test_experiment import config

WORDS = ["w3", "w4", "w5"]
CASE = Case("ptec", {"label_words": WORDS, "num_soft_tokens": 4})
TASK = {"name": "any", "template": "{text}", "label_column": "label", "label_words": WORDS}


def composed(task: dict[str, Any], **method: Any) -> Config:
    method = {"name": "ptec", "label_words": "${task.label_words}", **method}
    loaded: Config = load_config({"task": {**TASK, **task}, "method": method})
    return loaded


def log_probabilities(model: AdaptedModel) -> Tensor:
    """(5, 3): row by row, without padding, from the equations: the soft tokens, then the instruction."""
    bare, method, rows = build_backbone(model.backbone.name).lm, model.method, []
    for item in examples():
        words = bare.get_input_embeddings()(torch.tensor([item.instruction]))
        inputs = torch.cat([method.prompt[None], words], 1)
        state = bare.base_model(inputs_embeds=inputs).last_hidden_state[0, -1]
        rows.append((method.head.weight @ state + method.head.bias).log_softmax(0))
    return torch.stack(rows)


def test_it_starts_from_the_label_words():
    settings, backbone = PtecConfig(name="ptec", label_words=WORDS, num_soft_tokens=7), build_backbone("llama")
    method = METHODS["ptec"].build(settings, backbone)
    table = backbone.lm.get_input_embeddings().weight
    assert torch.equal(method.prompt, table[[3, 4, 5, 3, 4, 5, 3]])
    assert {name: tuple(p.shape) for name, p in method.trainable().items()} == {
        "prompt": (7, 32), "head.weight": (3, 32), "head.bias": (3,),
    }  # fmt: skip


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_scores_and_loss_are_the_equations(shape: str):
    model = build_model(CASE, shape)
    expected, made = log_probabilities(model), batch(examples())
    torch.testing.assert_close(model.score(made), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.score(made).exp().sum(1), torch.ones(5))
    # Rows have 1 to 4 response tokens, and their labels are 0, 1, 2, 0, 1.
    weighted = sum(-expected[i, i % 3] * len(item.response) for i, item in enumerate(examples()))
    torch.testing.assert_close(model.loss(made, "sum"), weighted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.loss(made), weighted / int(made.response_mask.sum()), rtol=1e-4, atol=1e-4)


def test_its_head_learns_at_a_rate_of_its_own():
    model = build_model(Case("ptec", {"label_words": WORDS, "head_learning_rate": 0.5}), "llama")
    groups = model.parameter_groups(0.25, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.25, 0.1), (0.5, 0.0)]
    assert [{id(p) for p in group["params"]} for group in groups] == [
        {id(model.method.prompt)},
        {id(p) for p in model.method.head.parameters()},
    ]


def test_it_is_sized_by_its_soft_tokens():
    settings, backbone = PtecConfig(name="ptec", label_words=WORDS), build_backbone("llama")
    chosen, fitted = fit_to_budget(settings, backbone, 400)
    assert (fitted.knob, fitted.value, fitted.count) == ("num_soft_tokens", 9, 9 * 32 + 3 * 33)
    assert spec_of(chosen).count(chosen, backbone) == fitted.count


def test_its_integer_labels_the_tasks():
    assert composed({}).method.label_words == WORDS  # type: ignore[attr-defined]
    assert composed({}, label_words=WORDS).method.label_words == WORDS  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["ptec", "sciprompt"])
@pytest.mark.parametrize(
    ("task", "labels", "problem"),
    [
        ({"label_column": None, "label_words": [], "metrics": ["bleu"]}, None, "scores labels, but task any has none"),
        ({"options_column": "choices"}, None, "task.options_column = choices: .* allowed is null"),
        ({"scoring": "generation"}, None, "task.scoring = generation: .* allowed is likelihood"),
        ({"scoring": "constrained"}, None, "task.scoring = constrained: .* allowed is likelihood"),
        ({"normalize_scores": True}, None, "task.normalize_scores = true: .* allowed is false"),
        ({}, ["w4", "w3", "w5"], r"method.label_words = \['w4', 'w3', 'w5'\]: must be the task's"),
    ],
)
def test_a_task_it_cannot_score_is_one_clear_problem(method: str, task: dict, labels: list[str] | None, problem: str):
    with pytest.raises(ConfigError, match=f"1 problem in the configuration\n.*{problem}"):
        composed(task, name=method, **({"label_words": labels} if labels else {}))


def test_batches_that_it_cannot_use_are_refused():
    model, made = build_model(CASE, "llama"), batch(examples())
    made.labels = None
    with pytest.raises(ValueError, match="the batch needs them"):
        model.loss(made)
    made.choice_ids = made.choice_ids[:, :2]
    with pytest.raises(ValueError, match="the head knows 3 labels, the batch has 2 choices"):
        model.score(made)
    with pytest.raises(UserError, match=r"adapters\[0\]: scores choices in its own way"):
        RowMixture([model.method])


def test_in_ones_own_code():
    backbone = build_backbone("llama")
    model = iapt.attach(backbone.lm, {"name": "ptec", "label_words": ["w3", "w4"]}, tokenizer=backbone.tokenizer)
    made = iapt.make_batch(backbone.tokenizer, ["w9 w8", "w7 w6"], ["w4", "w3"], choices=["w3", "w4"])
    assert made.labels is not None
    assert made.labels.tolist() == [1, 0]
    scores = model.score(made)
    torch.testing.assert_close(model.loss(made), -(scores[0, 1] + scores[1, 0]) / 2)
    for words in ({}, {"label_words": []}):
        with pytest.raises((ConfigError, UserError), match="label_words"):
            iapt.attach(build_backbone("llama").lm, {"name": "ptec", **words}, tokenizer=backbone.tokenizer)


def test_a_run_and_its_evaluation(tmp_path: Path):
    base = config()
    method = PtecConfig(name="ptec", label_words=base.task.label_words)
    summary = experiment.run(dataclasses.replace(base, method=method), tmp_path / "run")
    again = experiment.evaluate(tmp_path / "run", tmp_path / "again", {})
    assert again.metrics["test"] == summary.metrics["test"]
    assert 0 <= summary.metrics["test"]["ece"] <= 1
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert all(torch.tensor(json.loads(line)["scores"]).exp().sum().item() == pytest.approx(1) for line in lines)
    with pytest.raises(ConfigError, match="must be the task's"):
        experiment.evaluate(tmp_path / "run", tmp_path / "other", {"task": {"label_words": ["yes", "no"]}})
