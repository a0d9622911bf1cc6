"""Training that starts from another run's adapter: what is taken over, what is refused, what a sweep makes of it."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import iapt
from iapt.config.errors import TrainingError, UserError
from iapt.config.method import SoftPromptConfig
from iapt.config.schema import Config, to_dict
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config
from iapt.model.checkpoint import load_adapter
from iapt.model.method import SoftPrompt
from iapt.runs import experiment, sweep
from iapt.runs.launch import launch, with_absolute_paths
from iapt.training.state import load_state
from iapt.training.trainer import Trainer
from tests.contracts.conftest import CASES, Case, build_model
from tests.test_experiment import SHAPE, config

Source = tuple[Path, dict[str, torch.Tensor]]
SMALL: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_soft_tokens": 4},
    "iapt": {"bottleneck": 8, "activation_training": "joint"},
    "idpg": {"bottleneck": 8, "phm_n": 8},
}


def small(name: str = "prompt_tuning", method: dict[str, Any] | None = None, **changes: Any) -> Config:
    """A few steps on another task than the source's; `method` are settings of the method called `name`."""
    toy = changes.pop("toy", "sentiment")
    settings = to_dict(config(toy, "prompt_tuning", **{"zero_shot": False, **changes}))
    settings["method"] = {"name": name, "learning_rate": 0.01, **SMALL.get(name, {}), **(method or {})}
    made = load_config(settings)
    assert isinstance(made, Config)
    return made


def trained(folder: Path, method: str) -> Source:
    experiment.run(small(method, toy="entailment"), folder)
    return folder, load_adapter(folder)[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return trained(tmp_path_factory.mktemp("source"), "prompt_tuning")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_soft_prompt_can_start_from_another_run(case: Case):
    config = METHODS[case.method].config
    assert ("init_from" in {f.name for f in fields(config)}) == issubclass(config, SoftPromptConfig)
    if case.method != "peft":
        assert isinstance(build_model(case, "llama").method, SoftPrompt) == issubclass(config, SoftPromptConfig)


@pytest.mark.parametrize("method", SMALL)
def test_training_starts_from_all_tensors_of_the_other_run(method: str, tmp_path: Path):
    """Buffers, and what bi-level training learns on held-out batches, among them."""
    folder, tensors = trained(tmp_path / "source", method)
    fresh = experiment.build(small(method), to_train=True)
    assert not same(fresh.model.adapter_state(), tensors)
    moved = experiment.build(small(method, method={"init_from": str(folder)}), to_train=True)
    assert same(moved.model.adapter_state(), tensors)
    assert f"starts from the {method} adapter in {folder}, trained on toy/entailment, seed 1" in moved.notes


def test_a_run_says_where_it_started_and_is_scored_without_it(source: Source, tmp_path: Path):
    folder = shutil.copytree(source[0], tmp_path / "source")
    run = tmp_path / "run"
    summary = experiment.run(small(method={"init_from": str(folder)}), run)
    assert summary.init_from == {
        "folder": str(folder), "task": "toy/entailment", "seed": 1, "method": "prompt_tuning",
    }  # fmt: skip
    assert experiment.run(small(), tmp_path / "fresh").init_from is None
    shutil.rmtree(folder)
    again = experiment.evaluate(run, tmp_path / "again", {})
    assert again.test == summary.test


def test_a_resumed_run_goes_on_from_its_own_state(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = {"method": {"init_from": str(source[0])}}
    whole = experiment.run(small(**changes), tmp_path / "whole")
    original, run = Trainer._train_step, tmp_path / "run"

    def die(self: Trainer) -> None:
        if self.step == 4:  # its last state is step 3's
            raise TrainingError("enough")
        original(self)

    monkeypatch.setattr(Trainer, "_train_step", die)
    with pytest.raises(TrainingError, match="enough"):
        experiment.run(small(**changes), run)
    monkeypatch.undo()
    state = load_state(run)
    assert state is not None
    assert not same(state["adapter"], source[1])
    resumed = experiment.run(replace(small(**changes), resume=True), run)
    assert resumed.best_dev_loss == whole.best_dev_loss
    assert same(load_file(run / "adapter.safetensors"), load_file(tmp_path / "whole" / "adapter.safetensors"))


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("lopa", {}, "holds an adapter of method prompt_tuning; allowed here: lopa"),
        ("prompt_tuning", {"method": {"num_soft_tokens": 8}}, r"other tensors: num_soft_tokens = 4 \(here 8\)"),
        ("prompt_tuning", {"budget": "320"}, r"other tensors: num_soft_tokens = 4 \(here 10\)"),
        ("prompt_tuning", {"seed": 2}, "backbone 'random', which this one .* is not: fingerprint is"),
        (
            "prompt_tuning",
            {"backbone": {"shape": {**SHAPE, "hidden_size": 64}}},
            "hidden_size is 64, the adapter's was 32",
        ),
    ],
    ids=["method", "size", "budget", "weights", "backbone"],
)
def test_an_adapter_that_does_not_fit_is_refused(source: Source, method: str, changes: dict[str, Any], words: str):
    own = {**changes.get("method", {}), "init_from": str(source[0])}
    others = {key: value for key, value in changes.items() if key != "method"}
    with pytest.raises(UserError, match=rf"^method.init_from = {source[0]}: .*{words}"):
        experiment.build(small(method, own, **others), to_train=True)


def test_settings_that_change_no_shape_may_differ_and_are_told(source: Source):
    changed = small(method={"init_from": str(source[0]), "position": "after_instruction"})
    parts = experiment.build(changed, to_train=True)
    assert same(parts.model.adapter_state(), source[1])
    assert any("position = 'before_instruction' (here 'after_instruction')" in note for note in parts.notes)


def test_a_missing_adapter_is_refused_before_the_folder_is_touched(source: Source, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for folder, words in (("nowhere", "no such folder"), ("empty", "found: nothing")):
        with pytest.raises(UserError, match=rf"^method.init_from = {tmp_path / folder}: .*{words}"):
            launch(small(method={"init_from": str(tmp_path / folder)}), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_relative_folders_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    found = with_absolute_paths(small("post", method={"source": "a/b", "init_from": "c"})).method.adapters()
    assert found == {"source": str(tmp_path / "a/b"), "init_from": str(tmp_path / "c")}
    assert with_absolute_paths(small()).method == small().method


@pytest.mark.parametrize(("method", "key"), [("prompt_tuning", "init_from"), ("post", "source")])
def test_a_cell_hangs_on_the_adapters_content_and_not_on_its_place(
    source: Source, method: str, key: str, tmp_path: Path
):
    def cell(name: str) -> str:
        return sweep.cell_id(small(method, {key: str(tmp_path / name)}))

    for name in ("a", "b", "c"):
        shutil.copytree(source[0], tmp_path / name)
    (tmp_path / "b" / "metrics.jsonl").unlink()
    save_file({name: tensor + 1e-3 for name, tensor in source[1].items()}, tmp_path / "c" / "adapter.safetensors")
    assert cell("a") == cell("b") != cell("c")
    before = cell("a")
    save_file({name: tensor + 1 for name, tensor in source[1].items()}, tmp_path / "a" / "adapter.safetensors")
    assert cell("a") != before
    assert len({cell("a"), cell("not there"), cell("nor there")}) == 3


def test_a_sweep_from_before_there_was_such_a_setting_keeps_its_cells():
    settings = small()
    older = to_dict(settings)
    del older["method"]["init_from"]
    for group, key in (
        ("source", "builder"),
        ("source", "quotes"),
        (None, "integer_labels"),
        (None, "metric_tokenizer"),
    ):
        task = older["task"]
        del (task[group] if group else task)[key]  # no settings of then either
    del older["preflight"]
    assert sweep.cell_id(settings) == sweep.hash_of({**older, "data": None})


def test_from_python(source: Source, tmp_path: Path):
    backbone = experiment.build(small()).backbone
    settings = {"name": "prompt_tuning", "num_soft_tokens": 4}
    folder = shutil.copytree(source[0], tmp_path / "source")
    model = iapt.attach(backbone.lm, {**settings, "init_from": str(folder)}, tokenizer=backbone.tokenizer)
    assert same(model.adapter_state(), source[1])
    with torch.no_grad():
        model.method.prompt += 1
    model.save(tmp_path / "saved")
    shutil.rmtree(folder)
    loaded = iapt.load(tmp_path / "saved", backbone=backbone.lm, tokenizer=backbone.tokenizer)
    assert same(loaded.adapter_state(), model.adapter_state())
    hooks = [len(layer._forward_pre_hooks) for layer in backbone.layers]
    with pytest.raises(UserError, match=r"^method.init_from = .*num_soft_tokens = 4 \(here 5\)"):
        iapt.attach(
            backbone.lm, {**settings, "num_soft_tokens": 5, "init_from": str(tmp_path / "saved")},
            tokenizer=backbone.tokenizer,
        )  # fmt: skip
    assert hooks == [len(layer._forward_pre_hooks) for layer in backbone.layers]
    # What was saved from Python tells no task and no seed.
    origin = experiment.build(small(method={"init_from": str(tmp_path / "saved")}), to_train=True).origin
    assert origin is not None
    assert origin.record() == {
        "folder": str(tmp_path / "saved"), "task": None, "seed": None, "method": "prompt_tuning",
    }  # fmt: skip
