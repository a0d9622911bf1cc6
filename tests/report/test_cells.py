"""What becomes a row, a column and a cell, and what may not share one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iapt.config.errors import UserError
from iapt.report.cells import MUST_AGREE, Board, Cell, Column, Row, gather, state
from iapt.report.runs import read_runs
from tests.report.folders import make_failed, make_run, make_sweep, make_unfinished

ENTAILMENT = Column("toy/entailment", "accuracy")


def board(root: Path, **options: Any) -> Board:
    [found] = gather(read_runs([root]), **options)
    return found


def only(found: Board) -> Cell:
    [cell] = found.cells.values()
    return cell


def test_methods_are_rows_tasks_columns_and_seeds_share_a_cell(tmp_path: Path):
    found = board(make_sweep(tmp_path))
    assert found.rows == [Row("lora"), Row("iapt")]
    assert found.columns == [ENTAILMENT, Column("toy/sentiment", "accuracy")]
    cell = found.cells[Row("iapt"), ENTAILMENT]
    assert cell.values == [0.95, 0.95, 0.9]
    assert cell.median == 0.95
    assert cell.mean == pytest.approx(0.9333, abs=1e-4)
    assert cell.std == pytest.approx(0.0289, abs=1e-4)


def test_settings_that_differ_make_rows_and_others_do_not(tmp_path: Path):
    for i, (steps, log) in enumerate([(20, 10), (20, 1), (40, 10)]):
        make_run(tmp_path / str(i), seed=i, settings={"trainer.max_steps": steps, "trainer.log_every": log})
    make_run(tmp_path / "3", method="iapt")
    found = board(tmp_path)
    assert [str(row) for row in found.rows] == ["lora, trainer.max_steps=20", "lora, trainer.max_steps=40", "iapt"]
    assert [len(cell.values) for cell in found.cells.values()] == [2, 1, 1]


def test_settings_that_differ_between_tasks_alone_make_no_rows(tmp_path: Path):
    make_run(tmp_path / "1", settings={"trainer.max_steps": 20})
    make_run(tmp_path / "2", task="toy/sentiment", settings={"trainer.max_steps": 40})
    assert board(tmp_path).rows == [Row("lora")]


def test_a_sweep_over_hardware_keeps_its_cells_apart(tmp_path: Path):
    for i, (device, processes) in enumerate([("cpu", 1), ("auto", 1), ("cpu", 2)]):
        hardware = {"device": device, "num_processes": processes}
        make_run(tmp_path / str(i), seed=i, settings={"hardware": hardware})
    found = board(tmp_path)
    assert [str(row) for row in found.rows] == ["lora, hardware.num_processes=1", "lora, hardware.num_processes=2"]
    assert [len(cell.values) for cell in found.cells.values()] == [2, 1]


def test_a_swept_budget_names_its_rows(tmp_path: Path):
    make_run(tmp_path / "1", settings={"budget": "20k"})
    make_run(tmp_path / "2", settings={"budget": "80k"})
    assert [str(row) for row in board(tmp_path).rows] == ["lora, budget=20k", "lora, budget=80k"]


VERSIONS = {"iapt": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"}
OTHER: dict[str, dict[str, Any]] = {
    "task.metric_tokenizer": {"settings": {"task.metric_tokenizer": "zh"}},
    "protocol": {"protocol": "paper"},
    "metric": {"metric": "f1", "metrics": {"test": {"accuracy": 0.7, "f1": 0.6}}},
    "data_fingerprint": {"data_fingerprint": "another"},
    "template_hash": {"template_hash": "another"},
    "backbone_fingerprint": {"fingerprint": "another"},
    **{f"versions.{name}": {"versions": {**VERSIONS, name: "another"}} for name in VERSIONS},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("key", MUST_AGREE)
def test_a_cell_refuses_to_mix(tmp_path: Path, key: str):
    make_run(tmp_path / "1", seed=1, settings={"task.metric_tokenizer": "default"})
    make_run(tmp_path / "2", **{"seed": 2, **OTHER[key]})
    with pytest.raises(UserError) as error:
        board(tmp_path)
    text = str(error.value)
    assert f": {key}: " in text
    assert str(tmp_path / "1") in text
    assert str(tmp_path / "2") in text
    assert text.count("(tiny): ") == 1, "only what differs is named"
    allowed = board(tmp_path, allow_mixed=[key])
    assert any(key in note for note in allowed.notes)
    for other in set(MUST_AGREE) - {key}:
        with pytest.raises(UserError):
            board(tmp_path, allow_mixed=[other])


def test_what_an_old_run_does_not_record_is_not_held_against_it(tmp_path: Path):
    make_run(tmp_path / "1", seed=1)
    old = make_run(tmp_path / "2", seed=2, protocol=None)
    (old / "config.yaml").write_text((old / "config.yaml").read_text().replace("protocol: strict\n", ""))
    assert len(only(board(tmp_path)).values) == 2


def test_rows_of_one_column_may_differ_with_a_word(tmp_path: Path):
    make_run(tmp_path / "1")
    make_run(tmp_path / "2", method="iapt", data_fingerprint="another")
    [note] = board(tmp_path).notes
    assert note == "toy/entailment: rows differ in data_fingerprint: ca30070087df662f (lora); another (iapt)"


def test_failed_unfinished_and_skipped_runs_stay_visible(tmp_path: Path):
    make_failed(tmp_path / "1", seed=1)
    make_run(tmp_path / "2", seed=2)
    make_unfinished(tmp_path / "3", seed=3)
    cell = only(board(tmp_path))
    assert cell.values == [0.75]
    assert [reason.split(": ", 1)[1].split(":")[0] for reason in cell.reasons] == ["failed", "unfinished"]

    for name, make, word in (("f", make_failed, "failed"), ("u", make_unfinished, "unfinished")):
        make(tmp_path / name / "1")
        assert state(only(board(tmp_path / name))) == word
    scored = {"metrics": {"test": {"meteor_note": "skipped: needs wordnet"}}, "metric": "meteor", "test": None}
    make_run(tmp_path / "s" / "1", **scored)
    cell = only(board(tmp_path / "s"))
    assert state(cell) == "skipped"
    assert cell.reasons[0].endswith("skipped: needs wordnet")
    assert state(None) == "not run"


def test_a_failure_that_was_retried_is_a_note(tmp_path: Path):
    make_failed(tmp_path / "1")
    make_run(tmp_path / "2")
    found = board(tmp_path)
    assert only(found).reasons == []
    assert found.notes == [f"left out {tmp_path / '1'}: failed, and another run of its cell and seed finished"]


def test_evaluations_count_only_where_no_run_does(tmp_path: Path):
    run = make_run(tmp_path / "run")
    for name, task, split in (
        ("a", "toy/entailment", "test"),
        ("b", "toy/entailment", "dev"),
        ("c", "glue/rte", "test"),
    ):
        folder = make_run(tmp_path / name, task=task, split=split, checkpoint=str(run))
        (folder / "config.yaml").unlink()
    found = board(tmp_path)
    assert [column.task for column in found.columns] == ["glue/rte", "toy/entailment"]
    assert all(len(cell.values) == 1 for cell in found.cells.values())
    assert sorted(note.split(":")[0] for note in found.notes) == [
        f"left out {tmp_path / 'a'}",
        f"left out {tmp_path / 'b'}",
    ]


def test_all_metrics(tmp_path: Path):
    values = {"bleu": 0.5, "bleu_signature": "nrefs:1", "rouge_l": 0.6, "meteor_note": "skipped: needs wordnet"}
    make_run(tmp_path / "1", metric="bleu", test=0.5, metrics={"test": values})
    assert [c.metric for c in board(tmp_path).columns] == ["bleu"]
    assert [c.metric for c in board(tmp_path, all_metrics=True).columns] == ["bleu", "rouge_l", "meteor"]


def test_backbones_have_boards_of_their_own(tmp_path: Path):
    make_run(tmp_path / "1")
    make_run(tmp_path / "2", backbone="other", fingerprint="x")
    assert [b.backbone for b in gather(read_runs([tmp_path]))] == ["tiny", "other"]


def test_nothing_to_report(tmp_path: Path):
    folder = make_run(tmp_path / "1")
    (folder / "config.yaml").unlink()
    (folder / "summary.json").write_text(json.dumps({"status": "failed", "reason": "why not"}))
    with pytest.raises(UserError, match="nothing to report(.|\n)*why not"):
        board(tmp_path)
