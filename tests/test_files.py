"""Files in the forms in which data sets really come, and what a reader would change in silence."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from iapt.config.errors import UserError
from iapt.config.schema import Config
from iapt.data.files import in_order, read_file, split_of
from iapt.data.source import load_rows
from iapt.data.task import build_task
from iapt.runs.sweep import cell_id
from tests.test_tasks import PLAIN, config_of, message, plain_rows, write

# As in GLUE's SST-2 and QNLI: marks open on one line and close on another, stand alone, or around a whole field.
GLUE = ['"it is', 'a film"', 'so "good" it', '"', '""', '"all of it"', "plain", 'he said "', '" and left']


def table(path: Path, texts: list[str], quoting: Any = None, delimiter: str = "\t") -> Path:
    with path.open("w", encoding="utf-8", newline="") as handle:
        if quoting is None:
            handle.write("".join(delimiter.join(row) + "\n" for row in [("text", "label"), *((t, "0") for t in texts)]))
        else:
            writer = csv.writer(handle, delimiter=delimiter, quoting=quoting)
            writer.writerows([("text", "label"), *((t, "0") for t in texts)])
    return path


def read(path: Path, quotes: str = "auto") -> list[str]:
    return [row["text"] for row in read_file(path, quotes)]


# --- tsv ----------------------------------------------------------------------------------------------------


def test_quotation_marks_in_tsv_are_text(tmp_path: Path) -> None:
    texts = (GLUE * 8)[:64]
    assert read(table(tmp_path / "a.tsv", texts)) == texts
    # marks that csv's reader would pair without a complaint, swallowing lines
    paired = ['"it is', "x", 'so it is "', "y"]
    with table(tmp_path / "b.tsv", paired).open() as handle:
        assert len(list(csv.reader(handle, delimiter="\t", strict=True))) == 3
    assert read(tmp_path / "b.tsv") == paired


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_a_tsv_that_only_a_csv_writer_can_have_written_is_read_as_it_was_meant(tmp_path: Path, quoting: int) -> None:
    texts = ['she said "no"', "two\nlines", "a\ttab", "plain", '"']
    assert read(table(tmp_path / "a.tsv", texts, quoting)) == texts


def test_a_tsv_that_can_be_both_is_refused_with_the_setting_that_decides(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", ["plain", 'she said "no"'], csv.QUOTE_MINIMAL)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f'{path}, row 2: "she said ""no""" is text with quotation marks, or a field')
    assert str(caught.value).endswith("task.source.quotes=literal or task.source.quotes=csv decides")
    assert read(path, "csv") == ["plain", 'she said "no"']
    assert read(path, "literal") == ["plain", '"she said ""no"""']
    # beside a mark that no csv writer leaves like that, it is text
    assert read(table(path, ['"she said ""no"""', 'so "good"'])) == ['"she said ""no"""', 'so "good"']


def test_a_broken_line_is_not_explained_away(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"it is\t0\na film "\t1\nno label\n"so"\t1\n')
    with pytest.raises(UserError, match=r"line 4: expected 2 columns, .* task\.source\.quotes=csv"):
        read(path)
    path.write_text("text\tlabel\nno label\n")
    with pytest.raises(UserError, match=r"line 2: expected 2 columns, as in the first line$"):
        read(path)


def test_the_setting_reaches_the_reader_and_csv(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "plain"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        table(folder / f"{split}.csv", ['"a" b', '"c"'], delimiter=",")
    assert "row that begins in line 2" in message(config_of(PLAIN), str(tmp_path))
    task = build_task(config_of(PLAIN, source={"quotes": "literal"}), str(tmp_path))
    assert [e.instruction for e in task.splits["test"]] == ['Text: "a" b\nAnswer:', 'Text: "c"\nAnswer:']


# --- columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text,label,text\na,0,b\n"),
        ("a.csv", "text,label, text \na,0,b\n"),
        ("a.tsv", "text\ttext\na\tb\n"),
        ("a.jsonl", '{"text": "a", "label": 0, "text": "b"}\n'),
        ("a.json", '[{"text": "a", "label": 0, "text": "b"}]'),
        ("a.jsonl", '{"x": {"text": "a", "text": "b"}}\n'),
    ],
)
def test_a_repeated_column_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"a\.[a-z]+.*'text'.* twice; each column needs its own name"):
        read_file(tmp_path / name)


def test_a_repeated_column_of_parquet_is_refused(tmp_path: Path) -> None:
    arrays = [pa.array(["a"]), pa.array(["b"])]
    pyarrow.parquet.write_table(pa.Table.from_arrays(arrays, ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'text' stands there twice"):
        read_file(tmp_path / "a.parquet")


# --- what is not a number -----------------------------------------------------------------------------------


def nan_rows(tmp_path: Path, kind: str) -> str:
    rows: list[dict[str, Any]] = [
        {"text": "a", "label": 0, "score": 0.5},
        {"text": "b", "label": 1, "score": float("nan")},
    ]
    folder = tmp_path / "mine" / "plain"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        if kind == "jsonl":
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            assert "NaN" in (folder / f"{split}.jsonl").read_text()
        elif kind == "json":
            (folder / f"{split}.json").write_text(json.dumps(rows))
        else:
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return str(tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_not_a_number_is_nothing(tmp_path: Path, kind: str) -> None:
    folder = nan_rows(tmp_path, kind)
    shown = {"template": "{text} {score}"}
    assert "task.template needs column 'score', which is null in row 2 of train" in message(
        config_of(PLAIN, **shown), folder
    )
    task = build_task(config_of(PLAIN, skip_if_empty=["score"], **shown), folder)
    assert [e.instruction for e in task.splits["test"]] == ["a 0.5"]
    without = build_task(config_of(PLAIN, templates_without={"score": "{text}"}, **shown), folder)
    assert [e.instruction for e in without.splits["test"]] == ["a 0.5", "b"]


def test_not_a_number_of_the_hub_and_inside_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a", "answers": {"score": [1.0, float("nan")]}, "label": float("nan")}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(rows))
    [row] = load_rows(config_of(PLAIN, source={"path": "some/where"}), "train", None)
    assert row == {"text": "a", "answers": {"score": [1.0, None]}, "label": None}


def test_null_inside_a_column_is_no_text(tmp_path: Path) -> None:
    rows = [{"text": ["a", None], "deep": {"x": None}, "label": 0}]
    folder = write(tmp_path, "mine/plain", train=rows, validation=rows, test=rows)
    for template in ("{text}", "{deep[x]}", "{text[1]}"):
        found = message(config_of(PLAIN, template=template), folder)
        assert "task.template: does not fit row 1 of train" in found
        assert "null within a column" in found
    found = message(config_of(PLAIN, template="{text[0]}", options_column="text"), folder)
    assert "task.options_column = text: expected a list without null in row 1 of train" in found


def test_nought_and_false_are_something(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0, "n": n} for n in (0, False, 0.0, None, "", " ", [], "0")]
    folder = write(tmp_path, "mine/plain", train=rows, validation=rows, test=rows)
    task = build_task(config_of(PLAIN, skip_if_empty=["n"], template="{text} {n}"), folder)
    assert [e.instruction for e in task.splits["test"]] == ["a 0", "a False", "a 0.0", "a 0"]


# --- shards -------------------------------------------------------------------------------------------------


def shard(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / name)


def test_raw_shards_of_the_hub_are_their_split(tmp_path: Path) -> None:
    folder, rows = tmp_path / "mine" / "plain", plain_rows(12, "t")
    for number in (2, 0, 1):
        shard(folder, f"train-0000{number}-of-00003.parquet", rows[4 * number : 4 * number + 4])
    shard(folder, "validation-00000-of-00001.parquet", plain_rows(3, "v"))
    shard(folder, "test-00000-of-00001-0123456789abcdef.parquet", plain_rows(2, "s"))
    task = build_task(config_of(PLAIN), str(tmp_path))
    assert [e.instruction for e in task.splits["train"]] == [f"Text: t {i}\nAnswer:" for i in range(12)]
    assert {name: len(members) for name, members in task.splits.items()} == {"train": 12, "dev": 3, "test": 2}
    named = config_of(PLAIN, source={"splits": {"train": "train-00001-of-00003"}})
    assert [row["text"] for row in load_rows(named, "train", str(tmp_path))] == [f"t {i}" for i in range(4, 8)]


def test_shards_that_do_not_fit_together(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "plain"
    shard(folder, "train-00000-of-00003.parquet", plain_rows(2, "t"))
    shard(folder, "train-00002-of-00003.parquet", plain_rows(2, "t"))
    found = message(config_of(PLAIN), str(tmp_path))
    assert "split 'train' has 2 of 3 shards" in found
    assert "number 1 is missing" in found
    shard(folder, "train-00000-of-00001.parquet", plain_rows(2, "t"))
    assert "split 'train' has 3 files" in message(config_of(PLAIN), str(tmp_path))
    (folder / "train.jsonl").write_text('{"text": "a", "label": 0}\n')
    assert "train.jsonl); keep one" in message(config_of(PLAIN), str(tmp_path))
    assert "no split 'test'" in message(config_of(PLAIN, source={"splits": {"train": "test"}}), str(tmp_path))


def test_names_of_shards() -> None:
    names = ["train-00000-of-00001.parquet", "train-00000-of-00001-abcdef0123456789.parquet", "train.csv", "a-b.json"]
    assert [split_of(Path(name)) for name in names] == ["train", "train", "train", "a-b"]
    with pytest.raises(UserError, match="keep one"):
        in_order([Path("train-00000-of-00001.parquet"), Path("train-00000-of-00001.jsonl")])


def test_the_readers_settings_belong_to_a_cell_only_where_they_are_set() -> None:
    config = Config(task=config_of(PLAIN))
    before = cell_id(config)
    for changes in ({"source": {"quotes": "csv"}}, {"integer_labels": "words"}):
        assert cell_id(Config(task=config_of(PLAIN, **changes))) != before
