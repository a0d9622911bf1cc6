"""Rows with options of their own: what a row does not offer is no answer to it, whatever the model prefers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from iapt.config.schema import Config
from iapt.model.adapted import AdaptedModel
from iapt.report.outcomes import Outcomes, outcomes
from iapt.report.runs import read_runs
from iapt.runs import experiment
from tests.test_experiment import config

WORDS = ["A", "B", "C", "D", "E"]
COUNTS = [4, 5, 2, 3, 5, 4]  # options of the test rows
LABELS = [3, 4, 0, 2, 1, 0]
TASK = {
    "name": "mine/choose", "source": {}, "template": "{question}\n{options}\nAnswer:", "response": "{label}",
    "label_column": "key", "label_words": WORDS, "options_column": "choices", "metrics": ["accuracy"],
    "split_rule": "official", "value_words": {},
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"question": f"{'why ' * (number + 1)}?", "choices": [f"reason {i}" for i in range(count)], "key": label}
        for number, (count, label) in enumerate(zip(COUNTS, LABELS, strict=True))
    ]
    folder = tmp_path / "data" / "mine" / "choose"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def choosing(data: Path, method: str = "zero_shot", **changes: Any) -> Config:
    # Batches of two, and instructions of unlike lengths: a row is not where it was in the split.
    return config(
        method=method, task=TASK | changes, data_dir=str(data), zero_shot=False, trainer={"eval_batch_size": 2}
    )


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("method", ["zero_shot", "calibrated"])
def test_likelihood_compares_a_rows_own_options(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: bool, method: str
) -> None:
    plain = AdaptedModel.score

    def prefers_later_words(model: AdaptedModel, batch: Any) -> torch.Tensor:
        # Factors of ten outweigh unlike token counts. What `calibrated` is fitted to is left alone.
        return plain(model, batch) + model.engine.active * 10.0 ** torch.arange(4, 9)

    monkeypatch.setattr(AdaptedModel, "score", prefers_later_words)
    summary = experiment.run(choosing(data, method, normalize_scores=normalize), tmp_path / "run")
    records = records_of(tmp_path / "run")
    assert [len(record["scores"]) for record in records] == COUNTS
    assert [record["label"] for record in records] == [count - 1 for count in COUNTS]
    assert [record["text"] for record in records] == [WORDS[count - 1] for count in COUNTS]
    assert summary.test == 3 / 6

    [run] = read_runs([tmp_path / "run"])
    run.settings = {f"task.{key}": TASK[key] for key in ("response", "label_words")}
    found = outcomes(run, "accuracy")
    assert isinstance(found, Outcomes)
    assert found.statistics[:, 0].tolist() == [1, 1, 0, 1, 0, 0]


def test_generation_takes_no_word_that_a_row_lacks(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def says_d(model: AdaptedModel, batch: Any, **options: Any) -> torch.Tensor:
        return torch.tensor([model.backbone.tokenizer.encode("D", add_special_tokens=False)] * len(batch))

    monkeypatch.setattr(AdaptedModel, "generate", says_d)
    chosen = dataclasses.replace(choosing(data, scoring="generation"), preflight="off")  # it would hear D as well
    summary = experiment.run(chosen, tmp_path / "run")
    assert [record["text"] for record in records_of(tmp_path / "run")] == ["D"] * 6
    assert [record["label"] for record in records_of(tmp_path / "run")] == [3, 3, -1, -1, 3, 3]
    assert summary.test == 1 / 6


def test_without_options_every_label_word_is_scored(tmp_path: Path) -> None:
    experiment.run(config("sentiment", "zero_shot"), tmp_path / "run")
    assert {len(record["scores"]) for record in records_of(tmp_path / "run")} == {2}
