"""Adapter folders of strangers: what they say is data, and what is no adapter is refused in a line."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from iapt.config.check import literal
from iapt.config.errors import TrainingError, UserError
from iapt.config.schema import BackboneConfig, to_dict
from iapt.data.formatting import make_examples, template_fields
from iapt.data.task import TaskConfig
from iapt.methods.settings import load_config
from iapt.model import stored
from iapt.model.backbone import build_backbone
from iapt.runs import experiment, own
from iapt.runs.restore import read_saved
from tests.test_experiment import config

SECRET = "planted-3f9c"
Meta = dict[str, Any]
Change = Callable[[Meta], None]


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECRET", "WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, SECRET)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        experiment.run(config(zero_shot=False), folder)
    return folder


def changed(run: Path, tmp_path: Path, change: Change) -> Path:
    """A copy of the adapter with another adapter.json."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(run / "adapter.safetensors", folder)
    meta = json.loads((run / "adapter.json").read_text())
    change(meta)
    (folder / "adapter.json").write_text(json.dumps(meta))
    return folder


def outcome(folder: Path, tmp_path: Path) -> str:
    """What is said of the adapter, or written about it; any error but ours ends the test."""
    try:
        experiment.evaluate(folder, tmp_path / "out", {"task": {"max_eval_examples": 2}})
    except (UserError, TrainingError) as error:
        return str(error)
    return "".join(p.read_text(errors="replace") for p in (tmp_path / "out").rglob("*") if p.is_file())


# Every place of adapter.json with every value that a program might trip over, a sample of them.
VALUES: tuple[Any, ...] = (
    None, [], {}, "text", -1, 0, 1e308, 10**30, True, float("nan"), "???", "\x1b[31m", ["a", None],
    "${oc.env:SECRET}", "\\${oc.env:SECRET}", {"_target_": "os.system", "command": "false"}, "!!python/none",
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from places(item, (*at, key))


def put(meta: Meta, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        meta = meta[key]
    meta[place[-1]] = value


@pytest.mark.parametrize("number", range(100))
def test_any_value_anywhere_is_taken_or_refused(run: Path, tmp_path: Path, number: int) -> None:
    draw = random.Random(number)
    meta = json.loads((run / "adapter.json").read_text())
    place, value = draw.choice(sorted(places(meta), key=str)), draw.choice(VALUES)
    said = outcome(changed(run, tmp_path, lambda meta: put(meta, place, copy.deepcopy(value))), tmp_path)
    assert SECRET not in said
    assert len(said.splitlines()) < 8 or '"status"' in said  # a line for each problem, and few problems


@pytest.mark.parametrize("key", ["schema_version", "method", "backbone", "config", "trainable_params", "template_hash"])
def test_a_missing_key_is_one_line(run: Path, tmp_path: Path, key: str) -> None:
    said = outcome(changed(run, tmp_path, lambda meta: meta.pop(key)), tmp_path)
    assert (len(said.splitlines()) == 1) == (key != "template_hash")


def test_stored_interpolations_are_text(run: Path, tmp_path: Path) -> None:
    template = "It says ${oc.env:SECRET} of \\${data_dir} and {text}"

    def change(meta: Meta) -> None:
        meta["config"]["tracking"]["project"] = "${oc.env:SECRET}"
        meta["config"]["task"]["value_words"] = {"a": {"b": template}}

    saved = read_saved(changed(run, tmp_path, change), {})
    assert saved.config.tracking.project == "${oc.env:SECRET}"
    assert saved.config.task.value_words == {"a": {"b": template}}
    assert SECRET not in outcome(saved.folder, tmp_path)


@pytest.mark.parametrize("text", ["plain", "${a}", "\\${a}", "\\\\${a} ${b:c}", "x \\\\\\${a}", "${", "\\"])
def test_what_was_stored_is_what_is_read(text: str) -> None:
    settings = {**to_dict(config()), "tracking": {"project": text, "tags": [text]}}
    found = load_config(literal(settings)).tracking
    assert (found.project, found.tags) == (text, [text])


def test_numbers_are_never_interpolations() -> None:
    with pytest.raises(UserError, match=r"seed = '\$\{oc\.env:SECRET\}': expected int"):
        load_config(literal({**to_dict(config()), "seed": "${oc.env:SECRET}"}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_are_finite(run: Path, tmp_path: Path, value: float) -> None:
    folder = changed(run, tmp_path, lambda meta: None)
    tensors = load_file(folder / "adapter.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "adapter.safetensors")
    assert f"tensor {name!r} has 1 of" in outcome(folder, tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 99_000_000) + b"{}", b"\x80\x04." * 9]
)
def test_tensor_files_that_are_none(run: Path, tmp_path: Path, content: bytes) -> None:
    folder = changed(run, tmp_path, lambda meta: None)
    (folder / "adapter.safetensors").write_bytes(content)
    said = outcome(folder, tmp_path)
    assert "cannot be read" in said
    assert len(said.splitlines()) == 1


class Planted:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_planted_pickle_is_not_loaded(run: Path, tmp_path: Path) -> None:
    folder = changed(run, tmp_path, lambda meta: None)
    torch.save({"x": Planted(tmp_path / "owned")}, folder / "adapter.safetensors")
    assert "cannot be read" in outcome(folder, tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b'{"a": 1', b"[]", b"null"])
def test_json_that_is_none(run: Path, tmp_path: Path, content: bytes) -> None:
    folder = changed(run, tmp_path, lambda meta: None)
    (folder / "adapter.json").write_bytes(content)
    assert len(outcome(folder, tmp_path).splitlines()) == 1


def test_json_without_end(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_BYTES", 1000)
    assert "allowed are 1,000" in outcome(changed(run, tmp_path, lambda meta: None), tmp_path)


TEMPLATES = {
    "{text.__class__}": "no attributes",
    "{text.__init__.__globals__}": "no attributes",
    "{text[0].__class__}": "no attributes",
    "{0}": "must name a column",
    "{": "brace",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("key", ["template", "response"])
def test_templates_reach_columns_alone(template: str, key: str) -> None:
    with pytest.raises(UserError, match=TEMPLATES[template]):
        template_fields(TaskConfig(**{"name": "x", "template": "{text}", "response": "{text}", key: template}))


@pytest.mark.parametrize("template", ["{text:>9999}", "{text:{width}}", "{text:0100000000}"])
def test_templates_do_not_pad_without_end(template: str) -> None:
    task = TaskConfig(name="mine", template=template, response="{text}")
    with pytest.raises(UserError, match="more than 999"):
        make_examples(task, template_fields(task), "test", [[("rows", 1, {"text": "a b", "width": 10**9})]])


def test_secrets_are_in_no_file(run: Path) -> None:
    assert not [p for p in run.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


# -- what a stranger's adapter names --------------------------------------------------------------------------


def test_paths_of_strangers_are_shown_and_given_again(run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "elsewhere"
    rows.mkdir()

    def change(meta: Meta) -> None:
        meta["config"]["data_dir"] = str(rows)

    folder = changed(run, tmp_path, change)
    with pytest.raises(UserError, match=rf"names data_dir = {rows}, but no run of this user .*give .*data_dir={rows}"):
        read_saved(folder, {})
    assert read_saved(folder, {"data_dir": str(rows)}).config.data_dir == str(rows)


def test_paths_of_ones_own_runs_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    paths = {"data_dir": "/data", "backbone.path": "/models/one"}
    sealed = own.seal(paths)
    assert own.is_own(paths, sealed)
    assert not own.is_own({**paths, "data_dir": "/etc"}, sealed)
    assert not own.is_own(paths, None)
    assert own.key_file().stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "somebody else's"))
    assert not own.is_own(paths, sealed)


def test_without_a_place_for_the_key_nothing_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert own.seal({}) is None
    assert not own.is_own({}, None)


SHAPE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: allowed are at most 10,000"),
        ({"intermediate_size": 10**12}, "GiB, and this machine's memory is"),
        ({"intermediate_size": -1}, "negative dimension"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
    ],
)
def test_sizes_of_no_model(shape: dict[str, Any], said: str) -> None:
    config = BackboneConfig(name="x", kind="random", shape={**SHAPE, **shape})
    with pytest.raises(UserError, match=said) as caught:
        build_backbone(config)
    assert len(str(caught.value).splitlines()) == 1
