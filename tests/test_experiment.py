"""One run from configuration to summary, and everything `evaluate` promises about its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from iapt.config.errors import TrainingError, UserError
from iapt.config.method import MethodConfig
from iapt.config.schema import Config
from iapt.folder.summary import Summary, read_summary
from iapt.methods.labels import LabelPromptConfig
from iapt.methods.registry import METHODS, MethodSpec, register
from iapt.methods.settings import load_config
from iapt.model.method import SoftPrompt
from iapt.runs import experiment

SHAPE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 128,
}  # fmt: skip
SUMMARY_KEYS = {
    "task", "method", "backbone", "seed", "trainable_params", "metric", "zero_shot", "dev", "test", "best_step",
    "steps", "train_seconds", "tokens_per_second", "peak_memory_bytes", "status", "versions",
    "data_fingerprint", "template_hash", "total_steps", "device_type",
}  # fmt: skip


def scores_labels(method: str) -> bool:
    return method in METHODS and issubclass(METHODS[method].config, LabelPromptConfig)


def config(
    toy: str = "entailment", method: str = "iapt", options: Mapping[str, Any] | None = None, **changes: Any
) -> Config:
    """A small real task on a random backbone; `options` go over the method's settings, `changes` over all groups."""
    configs = Path(__file__).parent.parent / "configs"
    folder = configs / "task" / "toy"
    shipped = configs / "method" / f"{method}.yaml"
    # A name that is no registered method is a config of one, LoRA of peft's for example.
    named = {} if method in METHODS else yaml.safe_load(shipped.read_text())
    settings: dict[str, Any] = {
        "task": {
            **yaml.safe_load((folder / f"{toy}.yaml").read_text()),
            "max_train_examples": 48,
            "max_eval_examples": 20,
        },
        "method": {**named, "name": method, "learning_rate": 0.01, **(options or {})},
        "backbone": {"name": "random", "kind": "random", "shape": SHAPE},
        "trainer": {"max_steps": 6, "eval_every": 3, "batch_size": 8, "learning_rate": 0.01, "log_every": 2},
        "hardware": {"device": "cpu"},
    }
    if method == "idpg":
        settings["method"] |= {"phm_n": 8}
    if scores_labels(method):
        settings["method"] |= {"label_words": "${task.label_words}"}
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return load_config(settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, experiment.run(config(), folder)


def test_the_run_folder(done: tuple[Path, Summary]):
    folder, summary = done
    reports = {"activations.json", "activations.png"}  # IAPT's own
    assert sorted({p.name for p in folder.iterdir()} - reports) == [
        "adapter.json", "adapter.safetensors", "metrics.jsonl", "predictions.jsonl", "summary.json",
    ]  # fmt: skip
    assert json.loads((folder / "summary.json").read_text()) == dataclasses.asdict(summary)
    assert {key for key, value in vars(summary).items() if value is not None} >= SUMMARY_KEYS
    assert read_summary(folder) == summary
    assert summary.status == "ok"
    assert all(0 <= value <= 1 for value in (summary.zero_shot, summary.dev, summary.test))
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    right = sum(r["text"] == r["reference"] for r in records)
    assert summary.test == right / len(records) == right / 20
    meta = json.loads((folder / "adapter.json").read_text())
    assert meta["schema_version"] == 1
    assert meta["method"]["name"] == "iapt"
    assert meta["template_hash"] == summary.template_hash
    assert meta["backbone"]["hidden_size"] == 32
    assert sum(t.numel() for t in load_file(folder / "adapter.safetensors").values()) == summary.trainable_params


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"peft"} | {"lora", "adalora"}))
@pytest.mark.parametrize("task", ["sentiment", pytest.param("describe", marks=pytest.mark.full)])
def test_evaluate_reproduces_every_method_exactly(tmp_path: Path, method: str, task: str):
    if scores_labels(method) and task == "describe":
        pytest.skip("scores labels, and this task has none")
    source = {"panda": "init_from", "post": "source"}.get(method)
    if source:
        experiment.run(config(task, "prompt_tuning", zero_shot=False), tmp_path / "source")
    teacher = {source: str(tmp_path / "source")} if source else {}
    summary = experiment.run(config(task, method, teacher, zero_shot=False), tmp_path / "run")
    again = experiment.evaluate(tmp_path / "run", tmp_path / "eval", {})
    assert again.test == summary.test
    assert again.metrics["test"] == summary.metrics["test"]
    assert (tmp_path / "eval" / "predictions.jsonl").read_text() == (tmp_path / "run" / "predictions.jsonl").read_text()
    dev = experiment.evaluate(tmp_path / "run", tmp_path / "dev", {}, "dev")
    assert dev.dev == summary.dev
    assert dev.test is None


def test_another_task_by_override(done: tuple[Path, Summary], tmp_path: Path):
    other = yaml.safe_load((Path(__file__).parent.parent / "configs/task/toy/sentiment.yaml").read_text())
    summary = experiment.evaluate(done[0], tmp_path / "eval", {"task": other})
    assert summary.task == "toy/sentiment"
    assert summary.template_hash != done[1].template_hash
    # A named task replaces the run's whole task, limits included; a single setting is laid over it.
    assert len((tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()) == 400
    experiment.evaluate(done[0], tmp_path / "few", {"seed": 1, "task": {"max_eval_examples": 7}})
    assert len((tmp_path / "few" / "predictions.jsonl").read_text().splitlines()) == 7


def test_a_different_backbone_is_refused(done: tuple[Path, Summary], tmp_path: Path):
    with pytest.raises(UserError, match="hidden_size is 16, the adapter's was 32"):
        experiment.evaluate(done[0], tmp_path / "a", {"backbone": {"shape": {"hidden_size": 16}}})
    tensors_differ = {"backbone": {"shape": {"initializer_range": 0.5}}}
    with pytest.raises(UserError, match="fingerprint is"):
        experiment.evaluate(done[0], tmp_path / "b", tensors_differ)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_unreadable_checkpoints(done: tuple[Path, Summary], tmp_path: Path):
    def refuse(match: str) -> None:
        with pytest.raises(UserError, match=match):
            experiment.evaluate(tmp_path / "run", tmp_path / "eval", {})

    refuse("no such folder")
    (tmp_path / "run").mkdir()
    refuse(r"adapter\.json is missing \(found: nothing\)")
    meta = (done[0] / "adapter.json").read_text()
    (tmp_path / "run" / "adapter.json").write_text(meta)
    refuse(r"adapter\.safetensors is missing")
    (tmp_path / "run" / "adapter.safetensors").write_bytes(b"broken")
    refuse("cannot be read")
    save_file({"generators.0.up": torch.zeros(1)}, tmp_path / "run" / "adapter.safetensors")
    refuse("do not fit")
    (tmp_path / "run" / "adapter.json").write_text(meta.replace('"schema_version": 1', '"schema_version": 9'))
    refuse("schema version 9")


def test_a_finished_folder_is_never_touched(done: tuple[Path, Summary]):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in done[0].iterdir()}
    with pytest.raises(UserError, match="already holds a finished run"):
        experiment.run(config(seed=2), done[0])
    with pytest.raises(UserError, match="already holds a finished run"):
        experiment.evaluate(done[0], done[0], {})
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in done[0].iterdir()} == before


def test_seeds_decide(tmp_path: Path, done: tuple[Path, Summary]):
    same = experiment.run(config(), tmp_path / "same")
    other = experiment.run(config(seed=2), tmp_path / "other")
    first = load_file(done[0] / "adapter.safetensors")
    assert all(torch.equal(t, first[k]) for k, t in load_file(tmp_path / "same" / "adapter.safetensors").items())
    assert not torch.equal(
        load_file(tmp_path / "other" / "adapter.safetensors")["generators.0.up"], first["generators.0.up"]
    )
    assert same.best_dev_loss == done[1].best_dev_loss != other.best_dev_loss


def test_a_method_that_diverges_fails_with_its_reason(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"loss is nan|dev loss is nan"):
        experiment.run(config(method="lora", trainer={"learning_rate": 1e25}), tmp_path / "run")


def test_a_dummy_method_walks_the_whole_road(tmp_path: Path):
    """Trainer, evaluator, saver and loader know no method by name."""

    class Shift(SoftPrompt):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.num_soft_tokens, self.position = 1, "after_instruction"
            self.gain = torch.nn.Parameter(torch.ones(width))

        def forward(self, layer, states, mask, previous):
            return states[:, -1:] * self.gain

    register("dummy", MethodSpec(MethodConfig, lambda c, b: Shift(b.hidden_size), lambda c, b: b.hidden_size))
    try:
        summary = experiment.run(config(method="dummy"), tmp_path / "run")
        assert summary.trainable_params == 32
        assert experiment.evaluate(tmp_path / "run", tmp_path / "eval", {}).test == summary.test
    finally:
        del METHODS["dummy"]


@pytest.mark.parametrize(("scoring", "choices"), [("likelihood", True), ("generation", False)])
def test_a_method_may_look_before_and_after_training(tmp_path: Path, scoring: str, choices: bool):
    seen: list[Any] = []

    class Looker(SoftPrompt):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.num_soft_tokens, self.position = 1, "after_instruction"
            self.gain = torch.nn.Parameter(torch.ones(width))

        def fit(self, model, batches):
            assert torch.equal(self.gain, torch.ones_like(self.gain))
            read = list(batches)
            rows = [row for batch in read for row in batch.indices.tolist()]
            assert {batch.choice_ids is not None for batch in read} == {choices}
            seen.append((sorted(rows), rows, model.training, float(torch.rand(()))))

        def forward(self, layer, states, mask, previous):
            seen.append((layer, len(states), torch.is_grad_enabled()))
            return states[:, -1:] * self.gain

        def findings(self):
            assert not torch.equal(self.gain, torch.ones_like(self.gain))
            seen.append("report")
            return ["a line for the user"]

        def observed(self):
            return [torch.nn.GELU(), torch.nn.GELU()]

    task = {"scoring": scoring, "max_new_tokens": 2}
    register("looker", MethodSpec(MethodConfig, lambda c, b: Looker(b.hidden_size), lambda c, b: b.hidden_size))
    try:
        experiment.run(
            config("sentiment", "looker", task=task, trainer={"eval_batch_size": 2}, preflight="off"), tmp_path / "run"
        )
        first = seen[0]
        assert first[0] == list(range(48)) != first[1]
        assert first[2] is False
        # Eight dev batches of two through two layers, without gradient.
        looked = seen.index("report") + 1
        assert seen[looked : looked + 16] == [(0, 2, False), (1, 2, False)] * 8
        assert (tmp_path / "run" / "activations.png").exists()
        seen.clear()
        experiment.run(
            config("sentiment", "looker", task=task, trainer={"eval_batch_size": 2}, preflight="off"),
            tmp_path / "again",
        )
        assert seen[0] == first
    finally:
        del METHODS["looker"]


def test_the_note_says_why_a_trained_method_is_no_better(tmp_path: Path):
    """A learning rate so small that nothing is learned."""
    summary = experiment.run(config(trainer={"learning_rate": 1e-12}), tmp_path / "run")
    assert "zero-shot" in summary.note or "dev loss never fell" in summary.note
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["note"] == summary.note


def test_classification_by_generation(tmp_path: Path):
    summary = experiment.run(
        config("sentiment", task={"scoring": "generation", "max_new_tokens": 3}, zero_shot=False),
        tmp_path / "run",
    )
    records = [json.loads(x) for x in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert summary.test == sum(r["text"].startswith(r["reference"]) for r in records) / len(records)


def test_a_shape_that_transformers_rejects_is_one_line(tmp_path: Path):
    shape = {**SHAPE, "hidden_size": 7}
    with pytest.raises(UserError, match=r"backbone.shape = .*'hidden_size': 7") as caught:
        experiment.run(config(backbone={"shape": shape}), tmp_path / "run")
    assert "\n" not in str(caught.value)
