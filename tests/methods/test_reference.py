"""The references: what they present, what they calibrate, and that nothing is trained."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from iapt.config.errors import UserError
from iapt.config.task import TaskConfig
from iapt.data.task import Example, Task
from iapt.methods.reference import InContextConfig, rewrite
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config
from iapt.model.checkpoint import load_adapter
from iapt.runs import experiment
from tests.contracts.conftest import Case, batch, build_model, examples
from tests.test_experiment import SHAPE, config

LIMIT = 92  # tokens: between the shortest and the longest instruction with four demonstrations


def task(labels: int | None = 2, train: int = 12) -> Task:
    words = [f"label{i}" for i in range(labels or 0)]
    made = [
        Example(f"train {i}", words[i % labels] if labels else f"text {i}", i % labels if labels else None)
        for i in range(train)
    ]
    settings = TaskConfig(name="t", separator=" => ", label_column="label" if labels else None, label_words=words)
    return Task(
        settings, {"train": made, "dev": [Example("dev 0", "x")], "test": [Example("test 0", "x")]}, "f", "h", []
    )


def shown(instruction: str) -> list[str]:
    return instruction.split("|")[:-1]


def test_demonstrations_are_training_examples_before_every_instruction():
    plain = task()
    made = rewrite(InContextConfig(name="in_context", shots=4, joiner="|"), plain, seed=3)
    [test], [dev] = made.splits["test"], made.splits["dev"]
    assert test.instruction.endswith("|test 0")
    assert shown(test.instruction) == shown(dev.instruction)
    assert set(shown(test.instruction)) <= {f"{e.instruction} => {e.response}" for e in plain.splits["train"]}
    assert len(set(shown(test.instruction))) == 4
    assert (made.fingerprint, made.template_hash, test.response) == ("f", "h", "x")
    assert plain.splits["test"] == [Example("test 0", "x")]


def test_no_demonstration_gives_away_its_own_answer():
    plain = task()
    made = rewrite(InContextConfig(name="in_context", shots=4, joiner="|"), plain, seed=3)
    counts = Counter()
    for before, after in zip(plain.splits["train"], made.splits["train"], strict=True):
        assert f"{before.instruction} => " not in after.instruction
        counts[len(shown(after.instruction))] += 1
    assert counts == {4: 8, 3: 4}


@pytest.mark.parametrize(("labels", "shots"), [(2, 4), (3, 6), (3, 2), (3, 5)])
def test_the_drawing_is_balanced_seeded_and_nested(labels: int, shots: int):
    plain = task(labels, train=18)

    def draw(count: int, seed: int = 1) -> list[str]:
        made = rewrite(InContextConfig(name="in_context", shots=count, joiner="|"), plain, seed)
        return shown(made.splits["test"][0].instruction)

    counts = Counter(text.split(" => ")[1] for text in draw(shots))
    assert len(counts) == min(labels, shots)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert draw(shots) == draw(shots)
    assert len({tuple(draw(shots, seed)) for seed in range(6)}) > 3
    assert draw(shots)[1:] == draw(shots - 1)


def test_a_small_or_generation_task_gives_what_it_has():
    made = rewrite(InContextConfig(name="in_context", shots=9, joiner="|"), task(None, train=3), seed=1)
    assert sorted(shown(made.splits["test"][0].instruction)) == [f"train {i} => text {i}" for i in range(3)]


def test_the_prior_is_the_mean_of_the_probabilities():
    model = build_model(Case("calibrated", {"examples": 6}), "llama")
    first, second = batch(examples(4, seed=5)), batch(examples(4, seed=6))
    with model.disabled():
        bare = torch.cat([model.score(first), model.score(second)])
    never = iter([first, second, None])  # a third batch is not asked for
    model.method.fit(model, never)
    prior = bare[:6].softmax(-1).mean(0)
    torch.testing.assert_close(model.score(first), bare[:4] - prior.log())
    assert next(never) is None
    model.method.fit(model, [first, second])  # again: not on top of the first
    torch.testing.assert_close(model.score(first), bare[:4] - prior.log())


def test_a_label_that_is_never_likely_gets_no_infinite_score():
    model = build_model(Case("calibrated"), "llama")
    model.score = lambda made: torch.tensor([[0.0, -500.0, -1.0]]).expand(len(made), 3)  # type: ignore[method-assign]
    model.method.fit(model, [batch(examples())])
    adjusted = model.method.adjust_scores(torch.tensor([[0.0, -500.0, -1.0]]))
    assert adjusted.isfinite().all()
    assert float(adjusted.max() - adjusted.min()) < 1e-3


def test_a_prior_over_other_labels_is_refused():
    model = build_model(Case("calibrated"), "llama")
    with pytest.raises(UserError, match="over 3 labels, this task has 2"):
        model.method.adjust_scores(torch.zeros(1, 2))


def test_without_label_scores_nothing_is_calibrated():
    model = build_model(Case("calibrated"), "llama")
    unfitted = METHODS["calibrated"].build(METHODS["calibrated"].config(name="calibrated"), model.backbone)
    unfitted.fit(model, [dataclasses.replace(batch(examples()), choice_ids=None, choice_mask=None)])
    assert torch.equal(unfitted.adjust_scores(torch.ones(2, 5)), torch.ones(2, 5))
    assert "equals zero_shot" in unfitted.findings()[0]
    assert "label prior" in model.method.findings()[0]


@pytest.mark.parametrize("method", ["zero_shot", "in_context", "calibrated"])
def test_a_reference_takes_no_step_and_says_so(tmp_path: Path, method: str):
    summary = experiment.run(config("sentiment", method), tmp_path / "run")
    assert (summary.steps, summary.trainable_params, summary.train_seconds) == (0, 0, 0)
    assert summary.best_dev_loss is None
    assert summary.note == "reference: trains nothing"
    tensors, meta = load_adapter(tmp_path / "run")
    assert set(tensors) == ({"log_prior", "labels"} if method == "calibrated" else set())
    assert meta["template_hash"] == summary.template_hash
    assert "dev_loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    if method == "zero_shot":
        assert summary.zero_shot == summary.test
        assert summary.metrics["zero_shot"] == summary.metrics["test"]


def test_calibration_changes_scores_and_the_saved_prior_alone_gives_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    experiment.run(config("sentiment", "calibrated"), tmp_path / "run")
    experiment.run(config("sentiment", "zero_shot"), tmp_path / "bare")
    monkeypatch.setattr("iapt.methods.reference.Calibrated.fit", lambda *args: pytest.fail("fitted again"))
    experiment.evaluate(tmp_path / "run", tmp_path / "eval", {})
    run, bare, evaluated = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("run", "bare", "eval"))
    assert run == evaluated != bare


def test_the_zero_shot_column_has_no_demonstrations(tmp_path: Path):
    summary = experiment.run(config("describe", "in_context"), tmp_path / "run")
    bare = experiment.run(config("describe", "zero_shot"), tmp_path / "bare")
    assert summary.metrics["zero_shot"] == bare.metrics["test"]
    assert summary.metrics["zero_shot"] != summary.metrics["test"]
    assert summary.data_fingerprint == bare.data_fingerprint
    assert summary.template_hash == bare.template_hash


def test_instructions_that_do_not_fit_lose_whole_demonstrations():
    short = experiment.build(config("sentiment", "in_context", trainer={"max_length": LIMIT}))
    numbers = set()
    for split, kept in short.task.splits.items():
        for item, example, bare in zip(short.items[split], kept, short.bare.splits[split], strict=True):
            whole = short.backbone.tokenizer(example.instruction)["input_ids"]
            assert item.instruction == tuple(whole), "an instruction was cut all the same"
            assert example.instruction.endswith(bare.instruction)
            numbers.add(example.instruction.count("\n\n"))
    assert len(numbers - {4}) >= 1
    assert len(numbers) >= 2
    assert [note for note in short.notes if "fewer than 4 demonstrations" in note]
    assert not [note for note in short.notes if "lost their beginning" in note]
    short.model.detach()
    roomy = experiment.build(
        config("sentiment", "in_context", backbone={"shape": {**SHAPE, "max_position_embeddings": 512}})
    )
    assert all(e.instruction.count("\n\n") == 4 for e in roomy.task.splits["test"])
    assert not [note for note in roomy.notes if "demonstrations" in note]
    roomy.model.detach()


def test_in_context_needs_a_demonstration():
    settings = {"name": "in_context", "shots": 0}
    with pytest.raises(UserError, match=r"method\.shots = 0: must be at least 1"):
        load_config({"task": {"name": "t", "template": "{x}"}, "method": settings})
