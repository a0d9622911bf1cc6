"""Tasks: sources, split rules, formatting, and every message about data that does not fit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from iapt.config.errors import ConfigError, UserError
from iapt.config.task import TaskConfig
from iapt.data.files import read_file
from iapt.data.source import load_rows
from iapt.data.task import Example, Task, build_task
from iapt.methods.settings import load_config

PLAIN = {
    "name": "mine/plain",
    "template": "Text: {text}\nAnswer:",
    "label_column": "label",
    "label_words": ["no", "yes"],
}
WRITE = {
    "name": "mine/write",
    "template": "Record: {record}\nText:",
    "response": "{text}",
    "group_references_by": "record",
    "metrics": ["bleu"],
}


def config_of(base: dict[str, Any], **changes: Any) -> TaskConfig:
    config = load_config(base | changes, TaskConfig)
    assert isinstance(config, TaskConfig)
    return config


def write(root: Path, name: str, **splits: list[dict[str, Any]]) -> str:
    (root / name).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (root / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(root)


def plain_rows(count: int, prefix: str) -> list[dict[str, Any]]:
    return [{"text": f"{prefix} {i}", "label": i % 2} for i in range(count)]


@pytest.fixture
def plain_dir(tmp_path: Path) -> str:
    splits = {s: plain_rows(n, s) for s, n in [("train", 40), ("validation", 21), ("test", 10)]}
    return write(tmp_path, "mine/plain", **splits)


def texts(task: Task, split: str) -> list[str]:
    return [example.instruction for example in task.splits[split]]


def message(config: TaskConfig, data_dir: str | None) -> str:
    with pytest.raises(UserError) as caught:
        build_task(config, data_dir)
    return str(caught.value)


# --- split rules ------------------------------------------------------------------------------------------


def test_official(plain_dir: str) -> None:
    task = build_task(config_of(PLAIN), plain_dir)
    assert task.splits["train"][1] == Example("Text: train 1\nAnswer:", "yes", 1)
    assert {s: len(e) for s, e in task.splits.items()} == {"train": 40, "dev": 21, "test": 10}
    assert texts(task, "dev")[0] == "Text: validation 0\nAnswer:"
    assert task.choices == ["no", "yes"]
    assert task.majority("dev") == pytest.approx(11 / 21)
    assert task.notes == ["train 40, dev 21, test 10 (official: the source's three labelled splits)"]


def test_halve_validation_gives_dev_the_floor_and_keeps_train(plain_dir: str) -> None:
    task = build_task(config_of(PLAIN, split_rule="halve_validation"), plain_dir)
    assert texts(task, "train") == [f"Text: train {i}\nAnswer:" for i in range(40)]
    assert (len(task.splits["dev"]), len(task.splits["test"])) == (10, 11)
    halves = texts(task, "dev") + texts(task, "test")
    assert set(halves) == {f"Text: validation {i}\nAnswer:" for i in range(21)}
    assert halves != sorted(halves, key=lambda t: int(t.split()[2])), "validation must be shuffled first"
    assert "split_seed 0" in task.notes[0]
    other = build_task(config_of(PLAIN, split_rule="halve_validation", split_seed=1), plain_dir)
    assert set(texts(other, "dev")) != set(texts(task, "dev"))


def test_carve_train_leaves_no_dev_row_in_train(plain_dir: str) -> None:
    task = build_task(config_of(PLAIN, split_rule="carve_train", carve_size=7), plain_dir)
    train, dev = texts(task, "train"), texts(task, "dev")
    assert len(train) == 33
    assert len(dev) == 7
    assert sorted(train + dev) == sorted(f"Text: train {i}\nAnswer:" for i in range(40))
    assert texts(task, "test") == [f"Text: validation {i}\nAnswer:" for i in range(21)]
    assert set(dev) != {f"Text: train {i}\nAnswer:" for i in range(7)}, "carved rows are drawn, not the first"


def test_split_validation_needs_nothing_else(tmp_path: Path) -> None:
    folder = write(tmp_path, "mine/plain", validation=plain_rows(57, "v"))
    task = build_task(config_of(PLAIN, split_rule="split_validation"), folder)
    assert {s: len(e) for s, e in task.splits.items()} == {"train": 47, "dev": 5, "test": 5}
    everything = [text for split in task.splits for text in texts(task, split)]
    assert sorted(everything) == sorted(f"Text: v {i}\nAnswer:" for i in range(57))
    assert "not the usual protocol" in task.notes[0]


def test_carve_train_twice_needs_nothing_else(tmp_path: Path) -> None:
    folder = write(tmp_path, "mine/plain", train=plain_rows(40, "t"))
    task = build_task(config_of(PLAIN, split_rule="carve_train_twice", carve_size=7), folder)
    assert {s: len(e) for s, e in task.splits.items()} == {"train": 26, "dev": 7, "test": 7}
    everything = [text for split in task.splits for text in texts(task, split)]
    assert sorted(everything) == sorted(f"Text: t {i}\nAnswer:" for i in range(40))
    found = message(config_of(PLAIN, split_rule="carve_train_twice", carve_size=20), folder)
    assert found == "task.carve_size = 20: 2 times that must be below the size of train, 40"


def test_each_protocol_has_its_rule(plain_dir: str) -> None:
    config = config_of(PLAIN, split_rule={"strict": "carve_train", "paper": "halve_validation"}, carve_size=7)
    sizes = {p: [len(e) for e in build_task(config, plain_dir, p).splits.values()] for p in ("strict", "paper")}
    assert sizes == {"strict": [33, 7, 21], "paper": [40, 10, 11]}
    assert build_task(config, plain_dir).fingerprint == build_task(config, plain_dir, "strict").fingerprint
    one = config_of(PLAIN, split_rule="official")
    assert build_task(one, plain_dir, "paper").fingerprint == build_task(one, plain_dir).fingerprint
    with pytest.raises(UserError, match="protocol = 'papers': allowed are strict, paper"):
        build_task(config, plain_dir, "papers")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"split_rule": "oficial"}, "task.split_rule = 'oficial': allowed are official, halve_validation"),
        ({"split_rule": {"paper": "official"}}, "needs exactly the keys strict, paper"),
        ({"split_rule": {"paper": "official", "strikt": "official"}}, "needs exactly the keys strict, paper"),
        ({"split_rule": {"paper": "halve", "strict": "official"}}, "task.split_rule.paper = 'halve': allowed are"),
        ({"split_rule": 3}, "task.split_rule = 3: allowed are"),
        ({"options_column": "choices", "label_column": None}, "task.options_column = choices: needs task.label_column"),
        ({"option_names_column": "names"}, "task.option_names_column = names: needs task.options_column"),
        ({"references_column": "answers"}, "task.references_column = answers: a task with a label_column has none"),
    ],
)
def test_settings_that_contradict_each_other(plain_dir: str, changes: dict[str, Any], says: str) -> None:
    assert says in message(config_of(PLAIN, **changes), plain_dir)
    with pytest.raises(ConfigError) as caught:
        load_config({"method": {"name": "iapt"}, "task": PLAIN | changes})
    assert says in str(caught.value)


def test_a_protocol_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="protocol = 'loose': allowed are strict, paper"):
        load_config({"method": {"name": "iapt"}, "protocol": "loose", "task": PLAIN})


def test_a_size_that_is_not_the_published_one_is_said(plain_dir: str) -> None:
    size = {"train": 40, "validation": 1021, "test": 10, "other": 3}
    task = build_task(config_of(PLAIN, official_size=size), plain_dir)
    assert task.notes[1:] == ["validation: 21 rows here, 1,021 in the official data set"]
    renamed = config_of(PLAIN, official_size={"train": 41}, source={"splits": {"validation": "train"}})
    notes = build_task(renamed, plain_dir).notes
    assert notes.count("train: 40 rows here, 41 in the official data set") == 2, "the source's names count"


def test_rows_that_share_references_are_never_split(tmp_path: Path) -> None:
    rows = [{"record": f"r{i // 3}", "text": f"text {i}"} for i in range(90)]
    folder = write(tmp_path, "mine/write", train=rows, validation=rows)
    for rule in ({"split_rule": "carve_train", "carve_size": 4}, {"split_rule": "split_validation"}):
        task = build_task(config_of(WRITE, **rule), folder)
        records = {split: set(texts(task, split)) for split in task.splits}
        assert not records["train"] & records["dev"]
        assert all(len(e.references) == 3 for e in task.splits["dev"])
        assert all(len(e.references) == 1 for e in task.splits["train"])
        assert len(task.splits["train"]) == 3 * len(records["train"]), "training keeps every row"


def test_overlap_with_train_is_said(tmp_path: Path) -> None:
    rows = plain_rows(6, "same")
    folder = write(tmp_path, "mine/plain", train=rows, validation=rows[:2], test=plain_rows(3, "new"))
    assert build_task(config_of(PLAIN), folder).notes[1:] == ["dev: 2 of 2 instructions also occur in train"]


def test_limits_draw_the_same_examples_every_time_and_say_so(plain_dir: str) -> None:
    some = build_task(config_of(PLAIN, max_train_examples=8, max_eval_examples=5), plain_dir)
    assert [len(some.splits[s]) for s in ("train", "dev", "test")] == [8, 5, 5]
    assert some.notes[1] == "train: 8 of 40 examples (split_seed 0)"
    again = build_task(config_of(PLAIN, max_train_examples=8, max_eval_examples=5), plain_dir)
    assert again.fingerprint == some.fingerprint
    more = build_task(config_of(PLAIN, max_train_examples=20), plain_dir)
    assert set(texts(some, "train")) < set(texts(more, "train"))
    assert texts(some, "train") != texts(more, "train")[:8]
    assert build_task(config_of(PLAIN, max_train_examples=400), plain_dir).splits["train"][39:]


# --- formatting -------------------------------------------------------------------------------------------


def test_generation_collects_references(tmp_path: Path) -> None:
    rows = [("a", "one"), ("b", "two"), ("a", "three")]
    made = [{"record": r, "text": t} for r, t in rows]
    task = build_task(config_of(WRITE), write(tmp_path, "mine/write", train=made, validation=made, test=made))
    assert task.splits["train"] == [Example(f"Record: {r}\nText:", t, None, (t,)) for r, t in rows]
    assert task.splits["test"] == [
        Example("Record: a\nText:", "one", None, ("one", "three")),
        Example("Record: b\nText:", "two", None, ("two",)),
    ]
    assert task.choices == []
    assert task.majority("test") is None


def test_value_words_lookups_and_format_specs(tmp_path: Path) -> None:
    row = {"kind": 3, "answers": {"text": ["x", "y"]}, "score": 0.5, "label": "yes"}
    folder = write(tmp_path, "mine/plain", train=[row], validation=[row], test=[row])
    config = config_of(
        PLAIN,
        template="{kind} {answers[text][1]} {score:.2f} {{}}:",
        response="it is {label}",
        value_words={"kind": {"3": "three"}},
    )
    assert build_task(config, folder).splits["dev"] == [Example("three y 0.50 {}:", "it is yes", 1)]


@pytest.mark.parametrize(("value", "label"), [(0, 0), (1, 1), ("1", 1), ("yes", 1), (" no ", 0), (1.0, 1), (True, 1)])
def test_integer_labels_ids_or_words(tmp_path: Path, value: Any, label: int) -> None:
    rows = [{"text": "t", "label": value}]
    folder = write(tmp_path, "mine/plain", train=rows, validation=rows, test=rows)
    assert build_task(config_of(PLAIN), folder).splits["test"][0].label == label


def test_identity_follows_content_order_and_wording(plain_dir: str, tmp_path: Path) -> None:
    task = build_task(config_of(PLAIN), plain_dir)
    assert len(task.fingerprint) == len(task.template_hash) == 16
    renamed = build_task(config_of(PLAIN, template="Text: {text}\nanswer:"), plain_dir)
    assert renamed.fingerprint != task.fingerprint
    assert renamed.template_hash != task.template_hash
    separated = build_task(config_of(PLAIN, separator="\n"), plain_dir)
    assert separated.template_hash != task.template_hash
    rows = plain_rows(40, "train")
    other = write(
        tmp_path / "b",
        "mine/plain",
        train=rows[::-1],
        validation=plain_rows(21, "validation"),
        test=plain_rows(10, "test"),
    )
    turned = build_task(config_of(PLAIN), other)
    assert turned.fingerprint != task.fingerprint
    assert turned.template_hash == task.template_hash


def test_a_template_that_ends_in_white_space_is_told(plain_dir: str) -> None:
    assert "white space" in build_task(config_of(PLAIN, template="{text}\n"), plain_dir).notes[-1]


# --- files ------------------------------------------------------------------------------------------------

ROWS = [{"text": 'a "quoted", comma', "label": 0}, {"text": "line\nbreak\ttab é\u2028", "label": 1}]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "lines.json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "mine" / "plain"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        path = folder / f"{split}.{suffix.rpartition('.')[2]}"
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
        if suffix == "json":
            path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
        elif suffix == "jsonl":
            path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n\n", encoding="utf-8", newline="")
        elif suffix == "lines.json":
            path.write_text("\n".join(lines), encoding="utf-8")
        elif suffix == "parquet":
            pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
        else:
            with path.open("w", encoding="utf-8", newline="") as handle:
                writer = csv.DictWriter(handle, ["text", "label"], delimiter="\t" if suffix == "tsv" else ",")
                writer.writeheader()
                writer.writerows(ROWS)
    task = build_task(config_of(PLAIN), str(tmp_path))
    assert task.splits["test"] == [
        Example('Text: a "quoted", comma\nAnswer:', "no", 0),
        Example("Text: line\nbreak\ttab é\u2028\nAnswer:", "yes", 1),
    ]


def test_csv_takes_long_fields(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "x" * 200_000 + ",1\n")
    assert len(read_file(tmp_path / "a.csv")[0]["text"]) == 200_000


def test_an_empty_cell_is_null_and_names_of_columns_are_trimmed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(" text , label\na, yes \n  ,1\nb,\n")
    rows = read_file(tmp_path / "a.csv")
    assert rows == [{"text": "a", "label": " yes "}, {"text": None, "label": "1"}, {"text": "b", "label": None}]
    (tmp_path / "b.csv").write_text("")
    assert read_file(tmp_path / "b.csv") == []


def test_one_file_is_the_train_split(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine" / "plain.csv"
    file.write_text("text,label\n" + "".join(f"t {i},{i % 2}\n" for i in range(40)))
    config = config_of(PLAIN, split_rule="carve_train_twice", carve_size=7)
    task = build_task(config, str(tmp_path))
    assert {s: len(e) for s, e in task.splits.items()} == {"train": 26, "dev": 7, "test": 7}
    folder = write(tmp_path / "other", "mine/plain", train=plain_rows(40, "t"))
    assert build_task(config, folder).fingerprint == task.fingerprint, "as a folder with nothing but train has it"
    for rule in ("official", "carve_train", "halve_validation", "split_validation"):
        found = message(config_of(PLAIN, split_rule=rule, carve_size=7), str(tmp_path))
        assert found == (
            f"task 'mine/plain': no split 'validation' in {file}; known: train; "
            "with nothing but a train split, use task.split_rule=carve_train_twice"
        )
    renamed = config_of(PLAIN, split_rule="split_validation", source={"splits": {"train": "t", "validation": "t"}})
    assert len(build_task(renamed, str(tmp_path)).splits["train"]) == 32
    parts = message(config_of(PLAIN, source={"subsets": ["a"]}), str(tmp_path))
    assert parts == f"task 'mine/plain': task.source.subsets names 'a', but there is no {file}/a"


def test_a_file_beside_the_folder_is_not_left_aside_in_silence(plain_dir: str) -> None:
    file = Path(plain_dir, "mine/plain.jsonl")
    file.write_text('{"text": "a", "label": 1}\n')
    found = message(config_of(PLAIN), plain_dir)
    assert found == f"task 'mine/plain': found {plain_dir}/mine/plain and {file}; keep one"


def test_source_splits_rename(tmp_path: Path) -> None:
    folder = write(
        tmp_path, "mine/plain", auxiliary=plain_rows(1, "a"), dev=plain_rows(2, "d"), test=plain_rows(3, "t")
    )
    names = {"train": "auxiliary", "validation": "dev", "test": "test"}
    task = build_task(config_of(PLAIN, source={"splits": names}), folder)
    assert [len(task.splits[s]) for s in ("train", "dev", "test")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("train.jsonl", '{"text": "a", "label": 0}\n{"text": \n', "line 2: not JSON"),
        (
            "train.jsonl",
            '{"text": "a", "label": 0}\n[1]\n',
            "line 2: expected an object with columns, not [1]",
        ),
        ("train.json", '[\n{"text": "a"},\n{"text" "b"}]', "line 3: not JSON"),
        ("train.json", "[3]", "entry 1: expected an object"),
        ("train.csv", "text,label\na,1\nb\n", "line 3: expected 2 columns"),
        ("train.csv", "text,label\na,1,2\n", "line 2: expected 2 columns"),
        ("train.csv", 'text,label\n"a,1\nb,0\n', "row that begins in line 2: unexpected end of data"),
        ("train.tsv", "text\tlabel\na\t1\nb\n", "line 3: expected 2 columns"),
        ("train.parquet", "nothing of the kind", "cannot be read"),
    ],
)
def test_unreadable_files_are_named_with_their_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    folder = write(tmp_path, "mine/plain", validation=plain_rows(2, "v"), test=plain_rows(2, "t"))
    (tmp_path / "mine" / "plain" / name).write_text(text)
    found = message(config_of(PLAIN), folder)
    assert found.startswith(str(tmp_path / "mine" / "plain" / name))
    assert says in found


def test_wrong_encoding(tmp_path: Path) -> None:
    folder = write(tmp_path, "mine/plain", validation=plain_rows(2, "v"), test=plain_rows(2, "t"))
    (tmp_path / "mine" / "plain" / "train.jsonl").write_bytes('{"text": "é", "label": 0}\n'.encode("latin-1"))
    assert "train.jsonl: cannot be read: 'utf-8' codec" in message(config_of(PLAIN), folder)


# --- messages about sources -------------------------------------------------------------------------------


def test_data_dir_must_exist(tmp_path: Path) -> None:
    assert message(config_of(PLAIN), f"{tmp_path}/none") == f"data_dir = {tmp_path}/none: no such folder"


def test_missing_split_names_those_that_exist(tmp_path: Path) -> None:
    folder = write(tmp_path, "mine/plain", train=plain_rows(3, "a"), validation=plain_rows(3, "v"))
    found = message(config_of(PLAIN), folder)
    assert f"no split 'test' in {tmp_path}/mine/plain; " in found
    assert found.endswith("known: train, validation")


def test_only_validation_points_to_the_rule_for_it(tmp_path: Path) -> None:
    folder = write(tmp_path, "mine/plain", validation=plain_rows(30, "v"))
    found = message(config_of(PLAIN, split_rule="halve_validation"), folder)
    assert "no split 'train'" in found
    assert found.endswith("use task.split_rule=split_validation")


def test_only_train_points_to_the_rule_for_it(tmp_path: Path) -> None:
    folder = write(tmp_path, "mine/plain", train=plain_rows(30, "t"))
    assert message(config_of(PLAIN), folder).endswith(
        "known: train; with nothing but a train split, use task.split_rule=carve_train_twice"
    )


def test_no_data_is_one_line_with_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "plane.csv").write_text("text,label\n")
    assert message(config_of(PLAIN), str(tmp_path)) == (
        f"task 'mine/plain': no data: {tmp_path} has no folder 'mine/plain' and no file 'mine/plain.csv'; "
        "did you mean 'mine/plane.csv'? known: mine/plane.csv; and task.source.path is not set"
    )


def test_two_files_of_one_split(plain_dir: str) -> None:
    Path(plain_dir, "mine/plain/train.csv").write_text("text,label\na,1\n")
    assert "split 'train' has 2 files" in message(config_of(PLAIN), plain_dir)


def test_empty_split(tmp_path: Path) -> None:
    folder = write(tmp_path, "mine/plain", train=[], validation=plain_rows(3, "v"), test=plain_rows(3, "t"))
    assert message(config_of(PLAIN), folder) == "task 'mine/plain': split 'train' is empty"


def test_a_rule_that_leaves_a_split_empty(tmp_path: Path) -> None:
    folder = write(tmp_path, "mine/plain", train=plain_rows(3, "a"), validation=plain_rows(1, "v"))
    found = message(config_of(PLAIN, split_rule="halve_validation"), folder)
    assert "split 'dev' is empty under split_rule halve_validation" in found
    found = message(config_of(PLAIN, split_rule="carve_train", carve_size=3), folder)
    assert found == "task.carve_size = 3: must be below the size of train, 3"


def test_no_source_at_all(tmp_path: Path) -> None:
    found = message(config_of(PLAIN), None)
    assert "data_dir (or IAPT_DATA_DIR) is not set" in found
    assert "task.source.path is not set" in found
    assert f"{tmp_path} has no folder 'mine/plain'" in message(config_of(PLAIN), str(tmp_path))


def test_generators_need_no_data() -> None:
    source = {"generator": "entailment"}
    template = {"template": "{text} {claim}"}
    task = build_task(config_of(PLAIN, source=source, **template), "/no/such/folder")
    assert all(task.splits.values())
    assert "task.source.generator = entailments: no toy task" in message(
        config_of(PLAIN, source={"generator": "entailments"}), None
    )


def test_the_hub_is_asked_last_and_its_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        if split == "test":
            raise ConnectionError("Couldn't reach\n the hub")
        return datasets.Dataset.from_list(plain_rows(4, split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"path": "some/where", "config": "c", "revision": "r"}
    assert len(build_task(config_of(PLAIN, source=source, split_rule="halve_validation"), None).splits["train"]) == 4
    assert asked == [("some/where", "c", "validation", "r"), ("some/where", "c", "train", "r")]
    found = message(config_of(PLAIN, source=source), str(tmp_path))
    assert f"{tmp_path} has no folder 'mine/plain'" in found
    assert "some/where (c): Couldn't reach the hub" in found


def test_missing_split_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Unknown split \"train\". Should be one of ['validation'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = config_of(PLAIN, source={"path": "some/where"})
    with pytest.raises(UserError, match=r"no split 'train' in some/where on the hub; known: validation; .*split_rule"):
        load_rows(config, "train", None)


def test_a_folder_of_the_task_keeps_the_hub_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    folder = write(tmp_path, "mine/plain", validation=plain_rows(3, "v"))
    assert "no split 'train'" in message(config_of(PLAIN, source={"path": "some/where"}), folder)


# --- messages about rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "row", "says"),
    [
        (
            {"template": "{txet}:"},
            {},
            "task.template needs column 'txet', which row 1 of train lacks; did you",
        ),
        ({"template": "{txet}:"}, {}, "did you mean 'text'? known: label, text"),
        ({"response": "{label} {reason}"}, {}, "task.response needs column 'reason'"),
        ({"label_column": "lable"}, {}, "task.label_column needs column 'lable', which row 1 of train lacks"),
        ({"value_words": {"kind": {"a": "b"}}}, {}, "task.value_words needs column 'kind'"),
        ({"group_references_by": "record"}, {}, "task.group_references_by needs column 'record'"),
        ({}, {"text": None}, "task.template needs column 'text', which is null in row 2 of train"),
        (
            {},
            {"label": 2},
            "label = 2 in row 2 of train is outside task.label_words; allowed are 0 (no), 1 (yes)",
        ),
        ({}, {"label": -1}, "hides the labels of a test split"),
        ({}, {"label": "maybe"}, "label = 'maybe' in row 2 of train is outside"),
        ({}, {"label": "7"}, "label = '7' in row 2"),
        ({}, {"label": 0.5}, "label = 0.5 in row 2"),
        ({"response": "{text}"}, {"text": " "}, "empty response in row 2 of train: task.response = '{text}'"),
        ({"template": "{text[key]}"}, {}, "task.template: does not fit row 1 of train of 'mine/plain'"),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], row: dict[str, Any], says: str) -> None:
    rows = [{"text": "fine", "label": 0}, {"text": "a", "label": 0} | row]
    folder = write(tmp_path, "mine/plain", train=rows, validation=rows, test=rows)
    assert says in message(config_of(PLAIN, **changes), folder)


def test_the_place_named_is_the_sources_even_after_shuffling(tmp_path: Path) -> None:
    rows = plain_rows(20, "v")
    rows[12]["label"] = 5
    folder = write(tmp_path, "mine/plain", train=plain_rows(3, "t"), validation=rows)
    assert "row 13 of validation" in message(config_of(PLAIN, split_rule="halve_validation"), folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"template": "{text"}, "task.template = '{text': expected '}' before end of string"),
        ({"template": "{} {text}"}, "every {} must name a column"),
        ({"template": "{0}"}, "every {} must name a column"),
        ({"template": "{text} {label}"}, "shows the label in the instruction"),
        ({"label_column": "truth", "template": "{text} {truth}"}, "shows the label in the instruction"),
        ({"metrics": ["bleu"]}, "'bleu' is a metric of generation tasks, this is a classification task"),
        ({"metrics": ["acuracy"]}, "unknown metric 'acuracy'; did you mean 'accuracy'?"),
    ],
)
def test_configs_that_do_not_fit(plain_dir: str, changes: dict[str, Any], says: str) -> None:
    assert says in message(config_of(PLAIN, **changes), plain_dir)
