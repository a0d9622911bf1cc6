"""Decoding that cannot leave the label words, against a slow walk over them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from iapt.config.errors import UserError
from iapt.config.task import TaskConfig
from iapt.data.batch import Encoded, Ids
from iapt.data.task import Example
from iapt.evaluation.evaluate import evaluate
from iapt.evaluation.trie import Trie, tries
from iapt.model.adapted import AdaptedModel
from iapt.runs import experiment
from tests.contracts.conftest import Case, batch, build_model, examples
from tests.test_experiment import config

EOS = 2
CASES = [
    Case("prompt_tuning", {"position": "before_instruction"}),
    Case("iapt", {"bottleneck": 8, "position": "after_instruction"}),
    Case("zero_shot"),
]
# One is the beginning of two others, and ends itself.
CHOICES: tuple[Ids, ...] = ((7, EOS), (7, 9, EOS), (7, 9, 4, 5, EOS), (8, 6, EOS), (8, 3, 3, EOS))


def labelled(count: int = 8) -> list[Encoded]:
    """Rows whose choices are these; every other row has other tokens, in another order."""
    others = tuple(tuple(token if token == EOS else token + 20 for token in ids) for ids in CHOICES[::-1])
    return [dataclasses.replace(e, choices=others if e.index % 2 else CHOICES) for e in examples(count)]


def predictions(model: AdaptedModel, items: list[Encoded], **settings) -> list[int]:
    task = TaskConfig(
        name="any", label_column="label", label_words=[f"word {i}" for i in range(5)], scoring="constrained", **settings
    )
    shown = [Example("text", "word", label=0) for _ in items]
    return [p["label"] for p in evaluate(model, task, shown, items, 3, Accelerator(cpu=True)).predictions]


def next_log_p(model: AdaptedModel, item: Encoded, seen: Ids) -> torch.Tensor:
    """(V,) of the token after instruction and `seen`: one full pass without a cache, over one row."""
    made = batch([item])
    made.response_ids = torch.tensor([[*seen, 0]])
    made.response_mask = torch.ones_like(made.response_ids, dtype=torch.bool)
    return model.engine.response_logits(made)[0, -1].log_softmax(-1).detach()


def walk(model: AdaptedModel, item: Encoded) -> int:
    """The label that the likeliest next token among the label words' leads to, step by step."""
    seen: Ids = ()
    while seen not in item.choices:
        following = sorted({ids[len(seen)] for ids in item.choices if ids[: len(seen)] == seen})
        log_p = next_log_p(model, item, seen)
        seen = (*seen, max(following, key=lambda token: float(log_p[token])))
    return item.choices.index(seen)


def totals(model: AdaptedModel, item: Encoded) -> list[float]:
    """Every label's log-likelihood, eos included."""
    return [
        sum(float(next_log_p(model, item, ids[:place])[token]) for place, token in enumerate(ids))
        for ids in item.choices
    ]


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def test_what_may_follow_and_where_it_ends():
    trie = Trie([(5, 6), (5,), (7, 8, 9, EOS)], EOS)
    assert (trie.depth, sorted(trie.following([]))) == (4, [5, 7])
    assert sorted(trie.following([5])) == [EOS, 6]
    assert trie.following([7, 8]) == [9]
    for ended in ([5, 6], [5, EOS], [5, EOS, 0], [7, 8, 9], [4], [5, 7, 6], [7, EOS, 8]):
        assert trie.following(ended) == [EOS]
    assert [trie.find(ids) for ids in ([5, 6, EOS], [5, EOS, 0, 0], [7, 8, 9, EOS])] == [0, 1, 2]
    for none in ([], [5, 6], [4], [7, EOS]):
        with pytest.raises(ValueError, match="none of the strings"):
            trie.find(none)


def test_every_row_has_a_tree_of_its_own():
    choices = ((3,), (4, 5)), ((4, 5, 6), (7,))
    rows = [dataclasses.replace(e, choices=c) for e, c in zip(examples(2), choices, strict=True)]
    first, second = tries(batch(rows), EOS, [None, None])
    assert (sorted(first.following([])), first.following([4]), first.depth) == ([3, 4], [5], 3)
    assert (sorted(second.following([])), second.following([4, 5]), second.depth) == ([4, 7], [6], 4)
    assert tries(batch(rows), EOS, [1, None])[0].following([]) == [3]  # a row that has the first option alone


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_greedy_is_the_likeliest_walk(case: Case, shape: str):
    model = build_model(case, shape)
    model.lm.generation_config.eos_token_id = 9  # what ends a label word is the tokenizer's eos, not the LM's
    expected = [walk(model, item) for item in labelled()]
    assert len(set(expected)) > 1
    assert predictions(model, labelled()) == expected


@pytest.mark.parametrize("beams", [5, 9])
@pytest.mark.parametrize("normalized", [False, True])
def test_as_many_beams_as_labels_find_the_likeliest_label(beams: int, normalized: bool):
    """And more beams than there are labels do no harm."""
    model = build_model(CASES[0], "llama")
    expected, greedy = [], [walk(model, item) for item in labelled()]
    for item in labelled():
        values = totals(model, item)
        expected.append(
            best([v / len(ids) for v, ids in zip(values, item.choices, strict=True)] if normalized else values)
        )
    assert expected != greedy
    assert predictions(model, labelled(), num_beams=beams, normalize_scores=normalized) == expected


def test_label_words_of_one_token_are_scored_as_by_likelihood():
    model = build_model(CASES[0], "llama")
    items = [dataclasses.replace(e, choices=((5,), (9,), (13,))) for e in examples(8)]
    assert predictions(model, items) == model.score(batch(items)).argmax(1).tolist()


def test_generation_shows_the_callers_function_instruction_and_new_ids():
    model, seen = build_model(CASES[0], "llama"), []

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        seen.append((row, tuple(ids.tolist())))
        return [3 + row, 9]

    shown = batch(examples(2))
    made = model.generate(shown, max_new_tokens=2, prefix_allowed_tokens_fn=allowed)
    rows = [tuple(ids) for ids in shown.instruction_ids.tolist()]
    assert seen[:2] == list(enumerate(rows))
    assert seen[2:] == [(row, (*ids, int(made[row, 0]))) for row, ids in enumerate(rows)]
    assert all(int(token) in (3 + row, 9) for row in (0, 1) for token in made[row])


def test_a_run_answers_with_label_words_alone(tmp_path: Path):
    settings = {"scoring": "constrained", "max_new_tokens": 1, "label_words": ["not entailed", "not"]}
    for name, beams in (("greedy", 1), ("beams", 4)):
        summary = experiment.run(config(task={**settings, "num_beams": beams}), tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        assert {(line["label"], line["text"]) for line in lines} <= {(0, "not entailed"), (1, "not")}
        assert "ece" not in summary.metrics["test"]
    again = experiment.evaluate(tmp_path / "beams", tmp_path / "again", {})
    assert again.metrics["test"] == summary.metrics["test"]


def test_without_eos_a_label_word_cannot_end(monkeypatch: pytest.MonkeyPatch):
    model = build_model(CASES[0], "llama")
    model.backbone.tokenizer.eos_token = None
    with pytest.raises(UserError, match="task.scoring = constrained: .* the tokenizer has none"):
        predictions(model, labelled())
