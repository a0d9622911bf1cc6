"""Labels in the data: words, or indices of words, and what happens where they could be both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iapt.config.errors import UserError
from iapt.config.task import TaskConfig
from iapt.data.labels import as_index, as_word
from iapt.data.task import build_task
from tests.test_tasks import PLAIN, config_of, write

STARS = ["1", "2", "3", "4", "5"]


def read(tmp_path: Path, words: list[str], values: list[Any], **changes: Any) -> list[str]:
    """The label words that rows with these labels are given."""
    rows = [{"text": f"t {i}", "label": value} for i, value in enumerate(values)]
    folder = write(tmp_path, "mine/plain", train=rows, validation=rows, test=rows)
    task = build_task(config_of(PLAIN, label_words=words, **changes), folder)
    assert [e.response for e in task.splits["test"]] == [words[e.label or 0] for e in task.splits["test"]]
    return [e.response for e in task.splits["test"]]


@pytest.mark.parametrize(
    ("words", "values", "meant"),
    [
        (STARS, ["1", "2", "3", "4", "5"], STARS),
        (STARS, [1, 2, 3, 4, 5], STARS),
        (STARS, [1.0, 5.0], ["1", "5"]),
        (STARS, ["2.0", "5.0"], ["2", "5"]),
        (STARS, [0, 1, 2, 3, 4], STARS),  # one can only be an index, so all are
        (STARS, ["0", "4"], ["1", "5"]),
        (["1", "2"], [0, 1], ["1", "2"]),
        (["1", "2"], ["1", "2"], ["1", "2"]),
        (["01", "00"], ["01", "00"], ["01", "00"]),
        (["0", "1"], ["1", 0, 1.0, "0"], ["1", "0", "1", "0"]),  # both readings agree
        (["1.5", "2.5"], [1.5, "2.5", 2.5], ["1.5", "2.5", "2.5"]),
        (["-1", "1"], [-1, 1, "-1"], ["-1", "1", "-1"]),
        (["true", "false"], [True, False, "true", "false"], ["true", "false", "true", "false"]),
        (["True", "False"], [True, False], ["True", "False"]),
        (["no", "yes"], [True, False], ["yes", "no"]),
        (["no", "yes"], ["yes", 1, "0", " no "], ["yes", "yes", "no", "no"]),
        (["0", "1", "unknown"], [1, "unknown"], ["1", "unknown"]),
    ],
)
def test_what_labels_mean(tmp_path: Path, words: list[str], values: list[Any], meant: list[str]) -> None:
    assert read(tmp_path, words, values) == meant


@pytest.mark.parametrize(
    ("words", "values", "says"),
    [
        (
            ["1", "2"],
            ["1", "1"],
            "label = '1' is the label word '1', or the index of '2': every row fits both readings",
        ),
        (["1", "0"], [0, 1], "label = 0 is the label word '0', or the index of '1': every row fits both"),
        (["1", "0"], ["0", "1"], "label = '0' is the label word '0', or the index of '1'"),
        (["01", "00"], [1, 0], "label = 1 is the label word '01', or the index of '00'"),
        (STARS, [1, 2, 3], "label = 1 is the label word '1', or the index of '2'"),
        (STARS, [0, 1, 5], "label = 1 is the label word '1', or the index of '2': 0 can only be an index, but 5 only"),
    ],
)
def test_two_meanings_are_refused_with_the_setting_that_decides(
    tmp_path: Path, words: list[str], values: list[Any], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, words, values)
    assert says in str(caught.value)
    assert str(caught.value).endswith("task.integer_labels=words or task.integer_labels=indices decides")


@pytest.mark.parametrize(
    ("integer_labels", "words", "values", "meant"),
    [
        ("words", ["1", "2"], [1, 2, "1"], ["1", "2", "1"]),
        ("indices", ["1", "2"], [1, 0, "1"], ["2", "1", "2"]),
        ("words", ["1", "0"], [0, 1], ["0", "1"]),
        ("indices", ["1", "0"], [0, 1], ["1", "0"]),
        ("indices", ["no", "yes"], [1, "no"], ["yes", "no"]),  # a word that is no number is that word all the same
        ("words", ["no", "yes"], ["yes", "no"], ["yes", "no"]),
    ],
)
def test_the_setting_decides(
    tmp_path: Path, integer_labels: str, words: list[str], values: list[Any], meant: list[str]
) -> None:
    assert read(tmp_path, words, values, integer_labels=integer_labels) == meant


def test_the_setting_refuses_what_it_excludes(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"label = 0 in row 1 of train is outside .* 1, 2 \(task\.integer_labels = words\)"
    ):
        read(tmp_path, ["1", "2"], [0, 1], integer_labels="words")
    with pytest.raises(UserError, match="label = 3 in row 2 of train is outside"):
        read(tmp_path, ["1", "2"], [0, 3], integer_labels="indices")
    with pytest.raises(UserError, match="-1 is how the hub hides"):
        read(tmp_path, ["1", "2"], [0, 1, -1])


def test_all_splits_are_read_alike(tmp_path: Path) -> None:
    ones, both = ([{"text": f"{i}", "label": v} for i, v in enumerate(values)] for values in ([1, 1], [0, 1]))
    folder = write(tmp_path, "mine/plain", train=both, validation=ones, test=ones)
    task = build_task(config_of(PLAIN, label_words=["1", "2"]), folder)
    assert {e.response for e in task.splits["test"]} == {"2"}
    assert task.config.integer_labels == "auto", "what the rows say is no setting of the user's"


def test_options_and_rows_that_are_made_here(tmp_path: Path) -> None:
    rows = [{"q": "?", "choices": ["a", "b", "c"], "answer": value} for value in (0, 1, 2)]
    base = {"name": "mine/options", "template": "{q} {options}", "options_column": "choices", "label_column": "answer"}
    folder = write(tmp_path, "mine/options", train=rows, validation=rows, test=rows)
    task = build_task(config_of(base, label_words=["1", "2", "3"]), folder)
    assert [e.response for e in task.splits["test"]] == ["1", "2", "3"]
    toy = {"source": {"generator": "sentiment"}, "template": "{comment}", "label_words": ["1", "0"]}
    labels = {e.label for e in build_task(config_of(PLAIN, **toy), None).splits["test"]}
    assert labels == {0, 1}


def test_labels_that_are_no_labels() -> None:
    for value in (None, [1], {"a": 1}, float("nan"), float("inf"), "1e0", "", "nan", 0.5):
        assert as_word(["0", "1", "inf"][:2], value) is None
        assert as_index(["a", "b"], value) is None
    assert TaskConfig().integer_labels == "auto"
