"""Label words that are special tokens of a real tokenizer, from training to the score, however labels are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from iapt.config.errors import UserError
from iapt.folder.summary import Summary
from iapt.model.backbone import TINY_DIR
from iapt.runs import experiment
from tests.test_experiment import config

SCORINGS = ("likelihood", "generation", "constrained")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The embedded backbone with two special tokens more, one named by a role and one not."""
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = AutoTokenizer.from_pretrained(TINY_DIR)
    lm = AutoModelForCausalLM.from_pretrained(TINY_DIR)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|yes|>"]})
    tokenizer.add_tokens([AddedToken("<|no|>", special=True)])
    torch.manual_seed(0)
    lm.resize_token_embeddings(len(tokenizer))
    tokenizer.save_pretrained(folder)
    lm.save_pretrained(folder)
    return {"name": "special", "kind": "pretrained", "path": str(folder), "shape": {}}


def train(backbone: dict[str, Any], folder: Path, words: list[str], **task: Any) -> Summary:
    changes = {"label_words": words, "max_train_examples": 800, "max_eval_examples": 40, **task}
    trainer = {"max_steps": 120, "eval_every": 40, "learning_rate": 1e-3, "batch_size": 16}
    return experiment.run(
        config("sentiment", "full", backbone=backbone, task=changes, trainer=trainer, zero_shot=False), folder
    )


def labels(folder: Path) -> list[int]:
    return [json.loads(line)["label"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "words",
    [["<|no|>", "<|yes|>"], pytest.param(["<|no|> ball", "<|yes|> ball"], marks=pytest.mark.full)],
    ids=["alone", "in a text"],
)
def test_every_way_of_reading_labels_finds_the_same(backbone: dict[str, Any], tmp_path: Path, words: list[str]) -> None:
    summary = train(backbone, tmp_path / "run", words)
    assert summary.test > 0.9
    for scoring in SCORINGS:
        again = experiment.evaluate(tmp_path / "run", tmp_path / scoring, {"task": {"scoring": scoring}})
        assert again.test == summary.test
        assert labels(tmp_path / scoring) == labels(tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize("word", ["<eos>", "<pad>"])
def test_a_word_that_ends_or_fills_a_text_is_scored_but_never_decoded(
    backbone: dict[str, Any], tmp_path: Path, word: str
) -> None:
    words = [word, "<|yes|>"]
    summary = train(backbone, tmp_path / "run", words)
    assert summary.test > 0.9
    again = experiment.evaluate(tmp_path / "run", tmp_path / "constrained", {"task": {"scoring": "constrained"}})
    assert again.test == summary.test
    says = f"task.label_words: '{word}' cannot be told in a generated text"
    with pytest.raises(UserError, match=says):
        experiment.evaluate(tmp_path / "run", tmp_path / "generation", {"task": {"scoring": "generation"}})
    with pytest.raises(UserError, match=says):
        train(backbone, tmp_path / "other", words, scoring="generation")
    assert not (tmp_path / "other" / "metrics.jsonl").exists()
