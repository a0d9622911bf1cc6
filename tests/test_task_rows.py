"""Rows of less plain data sets: options of their own, lists, several answers, empty columns, parts in sub-folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from iapt.data.task import Example, Task, build_task
from tests.test_tasks import config_of, message, write

CHOOSE = {
    "name": "mine/choose",
    "template": "{question}\n{options}\nAnswer:",
    "options_column": "choices.text",
    "option_names_column": "choices.label",
    "label_column": "key",
    "label_words": ["A", "B", "C", "D"],
}
SPAN = {
    "name": "mine/span",
    "template": "{question}",
    "response": "{answers[text][0]}",
    "references_column": "answers.text",
    "metrics": ["qa_f1_em"],
}
FOUR = {"question": "q", "choices": {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]}, "key": "C"}


def built(tmp_path: Path, base: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> Task:
    folder = write(tmp_path, base["name"], train=rows, validation=rows, test=rows)
    return build_task(config_of(base, **changes), folder)


def refused(tmp_path: Path, base: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> str:
    return message(config_of(base, **changes), write(tmp_path, base["name"], train=rows, validation=rows, test=rows))


# --- options ----------------------------------------------------------------------------------------------


def test_options_stand_in_the_instruction_with_their_label_words(tmp_path: Path) -> None:
    three = {"question": "r", "choices": {"text": ["1", "2", "3"], "label": ["1", "2", "3"]}, "key": "3"}
    task = built(tmp_path, CHOOSE, [FOUR, three])
    assert task.splits["test"] == [
        Example("q\nA. w\nB. x\nC. y\nD. z\nAnswer:", "C", 2, (), 4),
        Example("r\nA. 1\nB. 2\nC. 3\nAnswer:", "C", 2, (), 3),  # "3" is the data's name of its third option
    ]
    assert task.choices == ["A", "B", "C", "D"]


@pytest.mark.parametrize(("value", "label"), [(1, 1), ("1", 1), ("D", 3)])
def test_without_names_the_label_is_an_id_or_a_label_word(tmp_path: Path, value: Any, label: int) -> None:
    row = {"question": "q", "choices": ["w", "x", "y", "z"], "key": value}
    task = built(tmp_path, CHOOSE, [row], options_column="choices", option_names_column=None)
    assert task.splits["test"][0].label == label


def changed(**changes: Any) -> dict[str, Any]:
    return FOUR | {"choices": FOUR["choices"] | changes}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (changed(text=list("vwxyz"), label=list("ABCDE")), "row 2 of train has 5 options, but task.label_words has 4"),
        (FOUR | {"key": "E"}, "key = 'E' in row 2 of train names none of its 4 options; it calls them A, B, C, D"),
        (changed(label=["A", "B", "C"]), "names none of its 4 options; it calls them A, B, C"),
        (
            FOUR | {"choices": {"text": ["x"]}},
            "task.option_names_column = choices.label: row 2 of train has no 'label'",
        ),
        (changed(text="wxyz"), "task.options_column = choices.text: expected a list in row 2 of train, not 'wxyz'"),
        (changed(text=[]), "expected a list in row 2 of train, not []"),
        ({"question": "q", "key": "A"}, "task.options_column needs column 'choices', which row 2 of train lacks"),
        (FOUR | {"choices": None}, "task.options_column needs column 'choices', which is null in row 2 of train"),
        ({"question": "q", "choices": FOUR["choices"]}, "task.label_column needs column 'key'"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    assert says in refused(tmp_path, CHOOSE, [FOUR, row])


def test_a_label_beyond_a_rows_options(tmp_path: Path) -> None:
    row = {"question": "q", "choices": ["w", "x"], "key": 2}
    found = refused(tmp_path, CHOOSE, [row], options_column="choices", option_names_column=None)
    assert found == "task 'mine/choose': row 1 of train has 2 options, but its label is C"


def test_the_options_columns_are_part_of_the_template_hash(tmp_path: Path) -> None:
    rows = [FOUR | {"key": 1}]
    named = built(tmp_path, CHOOSE, [FOUR])
    plain = built(tmp_path / "b", CHOOSE, rows, option_names_column=None)
    assert named.template_hash != plain.template_hash


# --- lists, references, templates, empty columns ----------------------------------------------------------


def test_a_list_is_shown_as_its_items(tmp_path: Path) -> None:
    row = {"question": "q", "table": {"header": ["a", "b"]}, "list": [1, 2], "answers": {"text": ["x"]}}
    template = "{table[header]} | {list: / } | {list[1]} | {question!r:>4}"
    assert built(tmp_path, SPAN, [row], template=template).splits["dev"][0].instruction == "a, b | 1 / 2 | 2 |  'q'"


def test_every_answer_of_a_row_is_a_reference(tmp_path: Path) -> None:
    rows = [{"question": "q", "answers": {"text": ["x", "y", "x"]}}, {"question": "q", "answers": {"text": ["z"]}}]
    task = built(tmp_path, SPAN, rows)
    assert task.splits["test"] == [Example("q", "x", None, ("x", "y", "x")), Example("q", "z", None, ("z",))]
    grouped = built(tmp_path / "b", SPAN, rows, group_references_by="question")
    assert grouped.splits["test"] == [Example("q", "x", None, ("x", "y", "x", "z"))]
    assert grouped.splits["train"] == task.splits["train"]


def test_a_row_without_answers_is_named(tmp_path: Path) -> None:
    rows = [{"question": "q", "answers": {"text": []}}]
    assert "task.response: does not fit row 1 of train" in refused(tmp_path, SPAN, rows)
    found = refused(tmp_path / "b", SPAN, rows, response="{question}")
    assert "task.references_column = answers.text: expected a list in row 1 of train, not []" in found


TELL = {"name": "mine/tell", "template": "{order} ({input})", "response": "{output}", "metrics": ["bleu"]}


def test_a_template_for_rows_in_which_a_column_is_empty(tmp_path: Path) -> None:
    rows = [{"order": "do", "input": value, "output": "o"} for value in ("x", "", " ", None)]
    task = built(tmp_path, TELL, rows, templates_without={"input": "{order}"})
    assert [e.instruction for e in task.splits["dev"]] == ["do (x)", "do", "do", "do"]
    bare = built(tmp_path / "b", TELL, rows[:1], templates_without={"input": "{order}!"})
    assert bare.template_hash != task.template_hash
    found = refused(tmp_path, TELL, rows, templates_without={"inptu": "{order}"})
    assert "task.templates_without needs column 'inptu', which row 1 of train lacks; did you mean 'input'?" in found
    found = refused(tmp_path, TELL, rows, templates_without={"input": "{ordre}"})
    assert "task.templates_without.input needs column 'ordre'" in found
    found = refused(tmp_path, TELL, rows, templates_without={"input": "{order"})
    assert "task.templates_without.input = '{order': expected '}'" in found


def test_rows_with_nothing_to_say_are_left_out_with_a_word(tmp_path: Path) -> None:
    rows = [{"order": f"do {i}", "input": "x", "output": out} for i, out in enumerate(("o", " ", None, "p"))]
    assert "empty response in row 2 of train" in refused(tmp_path, TELL, rows)
    task = built(tmp_path, TELL, rows, skip_if_empty=["output"], official_size={"train": 4})
    assert [e.response for e in task.splits["train"]] == ["o", "p"]
    assert "train: 2 rows left out, with nothing in output" in task.notes
    broken = [*rows[:3], {"order": "do 3", "output": "p"}]
    found = refused(tmp_path, TELL, broken, skip_if_empty=["output"])
    assert "row 4 of train" in found, "rows keep the numbers they have in the source"


# --- subsets ----------------------------------------------------------------------------------------------

PARTS = {
    "name": "mine/parts",
    "template": "{subset}: {text}",
    "response": "{text}",
    "metrics": ["exact_match"],
    "source": {"subsets": ["b", "a"]},
}


def test_subsets_are_put_one_after_another(tmp_path: Path) -> None:
    for part in ("a", "b"):
        write(tmp_path, f"mine/parts/{part}", **{s: [{"text": f"{part} {s}"}] for s in ("train", "validation", "test")})
    task = build_task(config_of(PARTS), str(tmp_path))
    assert [e.instruction for e in task.splits["test"]] == ["b: b test", "a: a test"]
    found = message(config_of(PARTS, source={"subsets": ["a", "c"]}), str(tmp_path))
    assert found == f"task 'mine/parts': task.source.subsets names 'c', but there is no {tmp_path}/mine/parts/c"
    (tmp_path / "mine/parts/a/test.jsonl").unlink()
    assert f"no split 'test' in {tmp_path}/mine/parts/a; known: train, validation" in message(
        config_of(PARTS), str(tmp_path)
    )


def test_subsets_are_the_hubs_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None, split: str, revision: str | None) -> datasets.Dataset:
        if name == "c":
            raise ConnectionError("no such configuration")
        return datasets.Dataset.from_list([{"text": f"{path} {name} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = build_task(config_of(PARTS, source={"path": "hub/parts", "subsets": ["b", "a"]}), None)
    assert [e.response for e in task.splits["dev"]] == ["hub/parts b validation", "hub/parts a validation"]
    found = message(config_of(PARTS, source={"path": "hub/parts", "subsets": ["c"]}), None)
    assert "hub: hub/parts (c): no such configuration" in found
