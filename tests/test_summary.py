"""`summary.json`: what is written is read again, older files and damaged ones are read as far as they go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iapt.config.errors import UserError
from iapt.folder.summary import Summary, read_summary, refuse_finished, write_summary


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    summary = Summary(task="t", seed=3, test=1, metrics={"test": {"accuracy": 1.0}}, status="ok")
    write_summary(tmp_path / "run", summary)
    assert read_summary(tmp_path / "run") == summary
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["schema_version"] == 1
    with pytest.raises(UserError, match="key = .*already holds a finished run"):
        refuse_finished(tmp_path / "run", "key")


def test_a_file_from_before_there_was_a_version(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"task": "t", "test": 0.5, "device": "x86_64", "status": "ok"}')
    old = read_summary(tmp_path)
    assert (old.schema_version, old.task, old.test, old.finished) == (0, "t", 0.5, True)
    assert (old.device, old.device_type) == ("x86_64", None)


def test_values_of_another_type_and_unknown_keys_are_left_out(tmp_path: Path) -> None:
    content = {"status": "ok", "seed": True, "test": "0.5", "metrics": [], "later": 1, "note": "kept"}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    assert read_summary(tmp_path) == Summary(schema_version=0, status="ok", note="kept")


@pytest.mark.parametrize("content", [None, "", "[]", '{"status": "ok"'])
def test_a_folder_without_a_summary_is_unfinished(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    assert read_summary(tmp_path) == Summary(status="unfinished")
    refuse_finished(tmp_path)


def test_a_summary_that_says_nothing_of_its_status_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    assert read_summary(tmp_path).status == "failed"
