"""Metrics against values worked out by hand, and their behaviour offline and side by side."""

from __future__ import annotations

import math
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sacrebleu

from iapt.config.errors import UserError
from iapt.metrics.metrics import (
    CLASSIFICATION,
    GENERATION,
    METRICS,
    NEEDS_WORDNET,
    Metric,
    check,
    compute,
    find_wordnet,
    notes,
)


def test_accuracy() -> None:
    assert compute(["accuracy"], [0, 1, 1, 0], [0, 1, 0, 0]) == {"accuracy": 0.75}


def test_macro_f1() -> None:
    # label 0: precision 1, recall 1/2; label 1: precision 2/3, recall 1
    assert compute(["f1"], [0, 1, 1, 1], [0, 0, 1, 1])["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_an_answer_that_is_no_label_is_wrong_but_no_class() -> None:
    values = compute(["accuracy", "f1"], [0, -1, 1, 1], [0, 0, 1, 1])
    assert values["accuracy"] == 0.75
    assert values["f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_bleu_by_hand() -> None:
    value = compute(["bleu"], ["a b c d e"], [["a b c d f"]])["bleu"]
    assert value == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    short = compute(["bleu"], ["a b c d"], [["a b c d e"]])["bleu"]
    assert short == pytest.approx(math.exp(1 - 5 / 4))


def test_bleu_takes_another_number_of_references_for_each() -> None:
    predictions = ["the cat is on the mat", "he sat down at once"]
    references = [["a cat sat there", "the cat is on the mat", "cat on mat"], ["he sat down right away"]]
    values = compute(["bleu"], predictions, references)
    streams = [
        ["a cat sat there", "he sat down right away"],
        ["the cat is on the mat", None],
        ["cat on mat", None],
    ]
    assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, streams).score / 100)
    assert values["bleu"] > compute(["bleu"], predictions, [r[:1] for r in references])["bleu"]
    # n-grams of order 1 to 4 found: 6 + 3 of 11, 5 + 2 of 9, 4 + 1 of 7, 3 + 0 of 5; lengths 11 = 6 + 5
    assert values["bleu"] == pytest.approx((9 / 11 * 7 / 9 * 5 / 7 * 3 / 5) ** 0.25)
    assert values["bleu_signature"].startswith("nrefs:var|case:mixed|")
    assert f"version:{sacrebleu.__version__}" in values["bleu_signature"]


def test_rouge_l_takes_the_best_reference() -> None:
    # longest common subsequence 2 of 3 and 4 words: F = 2 * 2 / (3 + 4)
    assert compute(["rouge_l"], ["the cat sat"], [["the cat ran fast"]])["rouge_l"] == pytest.approx(4 / 7)
    values = compute(["rouge_l"], ["the cat sat", "no"], [["a dog", "the cat ran fast"], ["no"]])
    assert values["rouge_l"] == pytest.approx((4 / 7 + 1) / 2)


def test_exact_match() -> None:
    values = compute(["exact_match"], [" a b", "c", ""], [["x", "a b "], ["C"], ["d"]])
    assert values == {"exact_match": pytest.approx(1 / 3)}


def test_an_empty_prediction_scores_nothing() -> None:
    values = compute(["bleu", "rouge_l", "exact_match"], [""], [["a b c d e"]])
    assert (values["bleu"], values["rouge_l"], values["exact_match"]) == (0, 0, 0)


def test_qa_is_the_mean_of_f1_and_exact_match_each_the_best_over_the_references() -> None:
    references = [["a red ball", "Red ball!"], ["in 1998", "the year 1998"], ["Paris"]]
    values = compute(["qa_f1_em"], ["the red ball", "year 1998 it was", "London"], references)
    # F1: 1; against "in 1998" 2 / (4 + 2), against "year 1998" 4 / (4 + 2); 0
    assert values == pytest.approx({"qa_f1_em": (5 / 9 + 1 / 3) / 2, "qa_f1": 5 / 9, "qa_em": 1 / 3})


def test_final_number_and_choice() -> None:
    solutions = [["He has 2 + 3 = 5.\n#### 5"], ["#### 1,080"], ["#### -3"], ["#### 7"]]
    predictions = ["first 4, then 5.", "so it is $1080.00", "#### 3", "I do not know"]
    assert compute(["final_number"], predictions, solutions) == {"final_number": 0.5}
    assert compute(["final_number"], ["none"], [["no number either"]]) == {"final_number": 0.0}
    choices = [["2 * 3 = 6\nThe answer is B."], ["The answer is D."], ["The answer is A."]]
    answers = ["A is wrong. The answer is B.", "The answer is (C)", ""]
    assert compute(["final_choice"], answers, choices) == {"final_choice": pytest.approx(1 / 3)}


class NoSynonyms:
    """A WordNet in which no word has a synonym."""

    def synsets(self, word: str) -> list[Any]:
        return []


def test_meteor_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iapt.metrics.metrics.find_wordnet", NoSynonyms)
    # precision 2/3, recall 2/2, so F = 10 P R / (R + 9 P); "cats" matches "cat" by its stem, in one chunk of two.
    expected = (10 * 2 / 3 / (1 + 9 * 2 / 3)) * (1 - 0.5 * (1 / 2) ** 3)
    assert compute(["meteor"], ["two cats sleep"], [["no", "two cat"]])["meteor"] == pytest.approx(expected)
    assert compute(["meteor"], ["two cats sleep", ""], [["two cat"], ["x"]])["meteor"] == pytest.approx(expected / 2)
    assert notes(["bleu", "meteor"]) == []


def test_meteor_without_wordnet_has_a_note_and_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iapt.metrics.metrics.find_wordnet", lambda: None)
    values = compute(["rouge_l", "meteor"], ["a b"], [["a b"]])
    assert values == {"rouge_l": 1.0, "meteor_note": "skipped: needs wordnet"}
    assert notes(["rouge_l"]) == []
    [note] = notes(["rouge_l", "meteor"])
    assert note.startswith(f"meteor: {NEEDS_WORDNET} (")
    with pytest.raises(UserError, match=r"the first is what is reported, and meteor needs WordNet"):
        check(["meteor", "bleu"], GENERATION)


@pytest.mark.parametrize("error", [LookupError("not there"), OSError("a file is missing")])
def test_wordnet_is_found_only_whole(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Incomplete:
        def ensure_loaded(self) -> None:
            raise error

    monkeypatch.setattr("nltk.corpus.wordnet", Incomplete())
    assert find_wordnet() is None


@pytest.mark.skipif(find_wordnet() is None, reason="nltk's WordNet data is not installed")
def test_meteor_matches_synonyms() -> None:
    # "small" and "little" are synonyms that their stems leave alone: all of both texts matches, in one chunk.
    assert compute(["meteor"], ["a jolly small cat"], [["a jolly small cat"]])["meteor"] == pytest.approx(1 - 0.5 / 64)
    assert compute(["meteor"], ["car"], [["auto"]])["meteor"] == pytest.approx(0.5)


def test_references_may_be_tuples_and_values_keep_their_order() -> None:
    values = compute(["rouge_l", "bleu"], ["a b c d"], [("a b c d", "e")])
    assert list(values) == ["rouge_l", "bleu", "bleu_signature"]
    assert values["bleu"] == pytest.approx(1)


def test_every_metric_is_of_one_kind() -> None:
    for metric in METRICS.values():
        assert issubclass(metric, Metric)
        assert metric.kind in (CLASSIFICATION, GENERATION)


def test_unknown_metric() -> None:
    with pytest.raises(UserError, match=r"unknown metric 'blue'; did you mean 'bleu'\? known: accuracy, bleu"):
        check(["blue"], GENERATION)


@pytest.mark.parametrize(
    ("name", "predictions", "references", "allowed"),
    [
        ("bleu", [0, 1], [0, 1], "accuracy, f1"),
        (
            "accuracy",
            ["a"],
            [["a"]],
            "bleu, rouge_l, exact_match, meteor, qa_f1_em, final_number, final_choice",
        ),
    ],
)
def test_metric_of_the_wrong_kind(name: str, predictions: Any, references: Any, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"'{name}' is a metric of .* allowed are {allowed}$"):
        compute([name], predictions, references)


@pytest.mark.parametrize(("predictions", "references"), [([], []), ([1], [1, 0])])
def test_lengths_must_agree(predictions: list[int], references: list[int]) -> None:
    with pytest.raises(ValueError, match="predictions and"):
        compute(["accuracy"], predictions, references)


def test_no_network_and_nothing_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("went to the network"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    compute(["accuracy", "f1"], [0, 1], [0, 1])
    generation = [name for name, metric in METRICS.items() if metric.kind == GENERATION and name != "meteor"]
    compute([*generation, "meteor"], ["a b"], [["a b"]])
    assert list(tmp_path.iterdir()) == []


def test_side_by_side() -> None:
    def one(i: int) -> float:
        return float(compute(["accuracy"], [0] * i + [1] * (20 - i), [0] * 20)["accuracy"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(20))) == [i / 20 for i in range(20)]
