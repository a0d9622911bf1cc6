"""SciPrompt's weighted verbaliser: weights and scores against slow computations, what it refuses, and a run."""

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
from iapt.methods.budget import fit_to_budget
from iapt.methods.registry import METHODS
from iapt.methods.sciprompt import SciPromptConfig, weigh
from iapt.methods.settings import load_config
from iapt.model.adapted import AdaptedModel
from iapt.model.method import SoftPrompt
from iapt.runs import experiment
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples
from tests.test_experiment import config

# Five terms for three labels; in the batches below they are of 1, 3, 2, 1 and 2 tokens.
WORDS = {"w3": ["w6", "w7 w8"], "w5": []}
LABELS = ["w3", "w4", "w5"]
TERMS = [(3,), (6, 9, 11), (7, 8), (4,), (5, 12)]
OWNERS = [0, 0, 0, 1, 2]
CASE = Case("sciprompt", {"label_words": LABELS, "num_soft_tokens": 4, "words": WORDS})


def built(case: Case = CASE, **options: Any) -> AdaptedModel:
    """The model of a case, with settings of its own."""
    return build_model(Case(case.method, {**case.options, **options}), "llama")


def items() -> list:
    return [dataclasses.replace(item, choices=tuple(TERMS)) for item in examples()]


def log_likelihoods(model: AdaptedModel) -> Tensor:
    """(5, 5): each term by a forward pass of its own over soft tokens, instruction and term; no batch, no cache."""
    lm, found = build_backbone("llama").lm, torch.zeros(5, len(TERMS))
    table = lm.get_input_embeddings()
    for row, item in enumerate(examples()):
        for column, term in enumerate(TERMS):
            inputs = torch.cat([model.method.prompt, table(torch.tensor([*item.instruction, *term]))])
            log_p = lm(inputs_embeds=inputs[None]).logits[0].log_softmax(-1)
            first = 4 + len(item.instruction) - 1
            found[row, column] = sum(log_p[first + place, token] for place, token in enumerate(term))
    return found


def cosine(first: list[int], second: list[int]) -> float:
    table = build_backbone("llama").lm.get_input_embeddings().weight
    a, b = table[first].mean(0), table[second].mean(0)
    return float(a @ b / (a.norm() * b.norm()))


def test_weights_follow_the_embedding_table():
    settings = SciPromptConfig(name="sciprompt", label_words=LABELS, words=WORDS)
    first, second, third = weigh(settings, build_backbone("llama"))
    raw = torch.tensor([1.0, max(cosine([3], [6]), 0.0), max(cosine([3], [7, 8]), 0.0)])
    assert raw.min() < raw.max()
    torch.testing.assert_close(first, raw / raw.sum())
    assert second.tolist() == third.tolist() == [1.0]
    settings.weighting = "uniform"
    assert [w.tolist() for w in weigh(settings, build_backbone("llama"))] == [pytest.approx([1 / 3] * 3), [1.0], [1.0]]


def test_a_term_unlike_its_label_has_no_weight_and_none_is_negative():
    far = min(range(6, 60), key=lambda token: cosine([3], [token]))
    near = max(range(6, 60), key=lambda token: cosine([3], [token]))
    settings = SciPromptConfig(name="sciprompt", label_words=["w3"], words={"w3": [f"w{far}", f"w{near}"]})
    assert cosine([3], [far]) < 0 < cosine([3], [near])
    [weights] = weigh(settings, build_backbone("llama"))
    assert weights[1] == 0
    assert 0 < weights[2] < weights[0]


@pytest.mark.parametrize("weighting", ["similarity", "uniform"])
@pytest.mark.parametrize("normalize", [False, True])
def test_scores_and_loss_are_the_equations(weighting: str, normalize: bool):
    model, made = built(weighting=weighting, normalize_terms=normalize), batch(items())
    terms, expected = log_likelihoods(model), torch.zeros(5, 3)
    for column, owner in enumerate(OWNERS):
        length = len(TERMS[column]) if normalize else 1
        expected[:, owner] += terms[:, column] / length * model.method.weights[column]
    torch.testing.assert_close(model.score(made), expected, rtol=1e-4, atol=1e-4)
    right = expected.log_softmax(1)
    loss = sum(-right[i, i % 3] * len(item.response) for i, item in enumerate(examples()))
    torch.testing.assert_close(model.loss(made, "sum"), loss, rtol=1e-4, atol=1e-4)


def test_without_terms_it_is_plain_scoring():
    model, plain, made = (
        built(words={}),
        build_model(Case("prompt_tuning", {"num_soft_tokens": 4}), "llama"),
        batch(examples()),
    )
    with torch.no_grad():
        plain.method.prompt.copy_(model.method.prompt)
    torch.testing.assert_close(model.score(made), plain.score(made), rtol=1e-4, atol=1e-4)  # a sum of one term


def test_it_starts_from_the_label_words_and_is_sized_by_its_soft_tokens():
    settings, backbone = SciPromptConfig(name="sciprompt", label_words=LABELS, words=WORDS), build_backbone("llama")
    chosen, fitted = fit_to_budget(settings, backbone, 300)
    assert (fitted.knob, fitted.value, fitted.count) == ("num_soft_tokens", 9, 288)
    method = METHODS["sciprompt"].build(chosen, backbone)
    assert isinstance(method, SoftPrompt)
    assert torch.equal(method.prompt, backbone.lm.get_input_embeddings().weight[[3, 4, 5] * 3])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"maybe": ["perhaps"]}, "method.words.maybe: no label word; allowed are no, yes"),
        ({"no": ["never"], "yes": ["sure", "never"]}, "method.words: 'never' occurs 2 times"),
        ({"no": ["yes"]}, "method.words: 'yes' occurs 2 times"),
        ({"no": 3}, "method.words = .*: expected"),
    ],
)
def test_words_that_do_not_fit_are_named(words: dict, problem: str):
    task = {"name": "any", "template": "{text}", "label_column": "label", "label_words": ["no", "yes"]}
    method = {"name": "sciprompt", "label_words": "${task.label_words}", "words": words}
    with pytest.raises(ConfigError, match=f"1 problem in the configuration\n.*{problem}"):
        load_config({"task": task, "method": method})


def test_choices_that_are_not_the_terms_are_refused():
    with pytest.raises(ValueError, match="there are 5 terms, the batch has 3 choices"):
        built().score(batch(examples()))
    backbone = build_backbone("llama")
    with pytest.raises(UserError, match="rewrites a task's text"):
        iapt.attach(backbone.lm, {"name": "sciprompt", "label_words": ["w3"]}, tokenizer=backbone.tokenizer)


def test_a_run_and_its_evaluation(tmp_path: Path):
    base = config()
    words = {"no": ["never", "not at all"], "yes": ["surely"]}
    method = SciPromptConfig(name="sciprompt", label_words=base.task.label_words, words=words)
    summary = experiment.run(dataclasses.replace(base, method=method), tmp_path / "run")
    again = experiment.evaluate(tmp_path / "run", tmp_path / "again", {})
    assert again.metrics["test"] == summary.metrics["test"]
    # The bare backbone is asked for the label words alone, as it is beside any other method.
    other = experiment.run(config(method="prompt_tuning"), tmp_path / "other")
    assert summary.metrics["zero_shot"] == other.metrics["zero_shot"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert {len(line["scores"]) for line in lines} == {2}
    assert {line["text"] for line in lines} <= {"no", "yes"}
