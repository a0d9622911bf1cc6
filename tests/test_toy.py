"""The toy tasks and the embedded backbone: deterministic, disjoint, balanced, and sayable."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from iapt.data import toy

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "iapt" / "tiny"
sys.path.insert(0, str(ROOT / "scripts"))
import tiny_corpus  # noqa: E402


def config(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / f"configs/task/toy/{name}.yaml").read_text()))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    rng = random.Random(7)
    return [tiny_corpus.document(rng, progress) for progress in (0.0, 0.2, 1.0) for _ in range(1500)]


def test_rows_do_not_depend_on_the_process():
    """Another interpreter with another hash salt and another global random state makes the same rows."""
    code = "import random; random.seed(5); from iapt.data import toy\n"
    code += "import zlib\n"
    code += "print(zlib.crc32(repr([toy.rows(n, s) for n in toy.NAMES for s in toy.SPLITS]).encode()))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(seen) == 1


@pytest.mark.parametrize("name", toy.NAMES)
def test_splits_have_their_size_and_share_no_input(name: str):
    inputs: list[object] = []
    for split, size in toy.SPLITS.items():
        rows = toy.rows(name, split)
        assert len(rows) == size
        for row in rows:
            # A record with its fields in another order is the same input.
            inputs.append(
                tuple(sorted(row["record"].split(", "))) if name == "describe" else str(row).split("'label'")[0]
            )
    assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize("name", ["entailment", "sentiment"])
@pytest.mark.parametrize("split", list(toy.SPLITS))
def test_integer_labels_balanced_and_shuffled(name: str, split: str):
    labels = [row["label"] for row in toy.rows(name, split)]
    assert sum(labels) * 2 == len(labels)
    assert labels != [0, 1] * (len(labels) // 2)
    assert 0.3 < sum(labels[: len(labels) // 2]) / (len(labels) // 2) < 0.7


def is_good(text: str) -> bool:
    """The polarity of the last opinion, from the words alone."""
    last = set(re.findall(r"\w+", text.split(" but ")[-1]))
    praised = bool(last & {*toy.PRAISE, *toy.LIKES})
    assert praised != bool(last & {*toy.BLAME, *toy.DISLIKES})
    return praised != ("not" in last)


def test_labels_recomputed_from_the_strings():
    for row in toy.rows("sentiment", "test"):
        assert is_good(row["comment"]) == bool(row["label"]), row
    for row in toy.rows("entailment", "test"):
        said = set(re.findall(r"\w+", row["text"]))
        claimed = re.findall(r"\w+", row["claim"])[-1]
        follows = {
            **{kind: bool(said & set(things)) for kind, things in toy.KINDS.items()},
            **{where: bool(said & set(places)) for where, places in toy.WHERE.items()},
            "happy": is_good(row["text"]),
            "sad": not is_good(row["text"]),
        }
        assert follows[claimed] == bool(row["label"]), row
        assert claimed not in said, "a claim repeats no word of the text"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="entailment"):
        toy.rows("nosuch", "train")
    with pytest.raises(ValueError, match="validation"):
        toy.rows("entailment", "dev")


@pytest.mark.parametrize("name", toy.NAMES)
def test_downstream_layout_is_new_and_its_words_are_not(name: str, corpus: list[str]):
    """No pretraining document has the downstream layout; every word of it occurs in some document."""
    template = config(name)["template"]
    known = {word for document in corpus for word in re.findall(r"\w+", document)}
    assert set(re.findall(r"\w+", template.format(**toy.rows(name, "test")[0]))) <= known
    # In pretraining these marks stand before single words only.
    layout = re.compile(r"(Note|Claim): (?!\w+ Answer:)")
    assert all(layout.search(template.format(**row)) for row in toy.rows(name, "test"))
    assert not [document for document in corpus if layout.search(document)]


@pytest.mark.parametrize("name", ["entailment", "sentiment"])
def test_label_words_are_one_token_and_answers_of_several_pretraining_tasks(
    name: str, corpus: list[str], tokenizer: PreTrainedTokenizerBase
):
    questions = tiny_corpus.TRUE + tiny_corpus.FALSE + tiny_corpus.GOOD + tiny_corpus.BAD
    for word in config(name)["label_words"]:
        assert len(tokenizer.encode(f" {word}")) == 1
        phrases = {
            phrase
            for wordings, answers in questions
            for phrase in wordings
            if word in answers and any(phrase in text and f"[{word}]" in text for text in corpus)
        }
        assert len(phrases) >= 3, phrases


def test_tokenizer_has_every_word_as_one_token_and_adds_nothing(tokenizer: PreTrainedTokenizerBase):
    classes = [word for words in toy.CLASSES.values() for word in words]
    for word in [word for words in toy.SLOTS.values() for word in words] + toy.PRAISE + toy.BLAME + classes:
        assert len(tokenizer.encode(f" {word}")) == len(tokenizer.encode(word)) == 1, word
    text = "Note: Mia has a red ball. Answer: yes"
    assert tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_model_fits_into_the_package():
    assert (TINY / "model.safetensors").stat().st_size <= 8_000_000
    assert sorted(p.name for p in TINY.iterdir()) == [
        "TRAINING.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
