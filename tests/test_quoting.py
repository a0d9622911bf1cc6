"""What YAML or Hydra's grammar makes of a text is refused wherever the schema wants text."""

from __future__ import annotations

import dataclasses
import datetime
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from iapt.benchmarks.harness import HarnessConfig
from iapt.benchmarks.mtbench import MtBenchConfig
from iapt.config.errors import ConfigError
from iapt.config.paths import CONFIG_DIR
from iapt.config.schema import Config
from iapt.config.task import TaskConfig
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config, method_config, unknown_keys

SCHEMAS = [Config, HarnessConfig, MtBenchConfig, *(spec.config for spec in METHODS.values())]
TASK = {"name": "t", "template": "{text}", "label_column": "label"}


def text_places(schema: type[Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(keys that lead to a setting, the place in it as a message names it, how to wrap a value for that place)."""
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        if isinstance(f.default_factory, type) and dataclasses.is_dataclass(f.default_factory):
            if f.name != "method":
                yield from text_places(f.default_factory, (*path, f.name))
            continue
        if f.metadata.get("choices") or f.metadata.get("numbers"):
            continue
        hint, key = str(hints[f.name]).replace("<class 'str'>", "str"), (*path, f.name)
        if hint in ("str", "str | None", "typing.Optional[str]"):
            yield key, "", lambda value: value
        elif hint == "list[str]":
            yield key, "[1]", lambda value: ["fine", value]
        elif hint == "dict[str, str]":
            yield key, ".x", lambda value: {"x": value}
        elif hint == "dict[str, dict[str, str]]":
            yield key, ".x.y", lambda value: {"x": {"y": value}}
        elif hint == "dict[str, list[str]]":
            yield key, ".x[0]", lambda value: {"x": [value]}


PLACES = [(schema, *place) for schema in SCHEMAS for place in text_places(schema)]


def nested(keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return typing.cast(dict[str, Any], value)


def problems_of(given: dict[str, Any], schema: type[Any]) -> list[str]:
    try:
        load_config(
            ({"method": {"name": "zero_shot"}} | given) if schema is Config and type(given) is dict else given, schema
        )
    except ConfigError as error:
        return error.problems
    return []


def test_the_walk_sees_every_kind_of_place() -> None:
    found = {".".join(key) + place for _, key, place, _ in PLACES}
    assert {
        "task.name", "task.template", "task.label_words[1]", "task.templates_without.x", "task.value_words.x.y",
        "task.source.subsets[1]", "task.source.splits.x", "backbone.revision", "tracking.tags[1]", "data_dir",
        "tasks[1]", "model_id", "words.x[0]", "judge.model",
    } <= found  # fmt: skip
    assert len(found) > 40


@pytest.mark.parametrize(("schema", "keys", "place", "wrap"), PLACES)
def test_every_text_is_refused_where_it_was_read_as_something_else(
    schema: type[Any], keys: tuple[str, ...], place: str, wrap: Callable[[Any], Any]
) -> None:
    name = ".".join(keys) + place
    for value in (False, True, 1, 1000, 1000.0, float("nan"), datetime.date(2024, 1, 1)):
        start = f"{name} = {value!r}: expected text, but without quotes this is read as a"
        found = [p for p in problems_of(nested(keys, wrap(value)), schema) if p.startswith(f"{name} =")]
        assert len(found) == 1
        assert found[0].startswith(start)
        assert "; quote it, for" in found[0]
    if place:
        assert any(p.startswith(f"{name} = None: expected text") for p in problems_of(nested(keys, wrap(None)), schema))
    for value in ("no", "01", "1e3", "nan", "null", "2024-01-01"):
        assert not [p for p in problems_of(nested(keys, wrap(value)), schema) if "expected text" in p]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("label_words: [no, yes]", ["task.label_words[0] = False: ", """line 'task.label_words=["no",...]')"""]),
        ("label_words: [off, on]", ["task.label_words[1] = True: "]),
        ("label_words: [01, 00]", ["task.label_words[0] = 1: ", "01 is 1 and 1_000 is 1000"]),
        ("label_words: [1_000, a]", ["task.label_words[0] = 1000: "]),
        ("label_words: [1.0, 2.50]", ["task.label_words[1] = 2.5: "]),
        ("label_words: [null, ~]", ["task.label_words[0] = None: ", "task.label_words[1] = None: "]),
        ("label_words: [a, ]\ntemplate:", ["task.template = None: expected text"]),
        ("value_words: {kind: {no: x}}", ["a key of task.value_words.kind = False: "]),
        ("value_words: {kind: {a: yes}}", ["task.value_words.kind.a = True: "]),
        ("templates_without: {on: x}", ["a key of task.templates_without = True: "]),
        ("source: {subsets: [en, no]}", ["task.source.subsets[1] = False: "]),
        ("source: {splits: {validation: off}}", ["task.source.splits.validation = False: "]),
        ("source: {revision: 0123456}", ["task.source.revision = 42798: "]),
        ("name: .nan", ["task.name = nan: "]),
    ],
)  # fmt: skip
def test_what_yaml_changed_is_named(text: str, says: list[str]) -> None:
    for given in (OmegaConf.create(text), yaml.safe_load(text)):
        found = "\n".join(problems_of({"task": given, "method": {"name": "zero_shot"}}, Config))
        for part in says:
            assert part in found


def test_dates_of_plain_yaml_are_named_too() -> None:
    [problem] = problems_of(TASK | yaml.safe_load("label_words: [2024-01-01, b]"), TaskConfig)
    assert problem.startswith("label_words[0] = datetime.date(2024, 1, 1): expected text, but")
    assert '"2024-01-01"' in problem


def test_quoted_texts_stay_to_the_letter() -> None:
    words = ["no", "on", "01", "1_000", "1e3", "null", "2024-01-01", " x "]
    text = yaml.safe_dump({"label_words": words})
    assert load_config(TASK | yaml.safe_load(text), TaskConfig).label_words == words
    text = OmegaConf.to_yaml({"label_words": words})
    assert load_config(OmegaConf.merge(TASK, OmegaConf.create(text)), TaskConfig).label_words == words


@pytest.mark.parametrize(
    ("typed", "words", "refused"),
    [
        ("[no,yes]", ["no", "yes"], []),  # Hydra's grammar knows true and false alone
        ("[01,00]", ["01", "00"], []),
        ('["true","false"]', ["true", "false"], []),
        ("[true,false]", None, ["task.label_words[0] = True", "task.label_words[1] = False"]),
        ("[1_000,b]", None, ["task.label_words[0] = 1000"]),
        ("[1e3,nan]", None, ["task.label_words[0] = 1000.0", "task.label_words[1] = nan"]),
        ("[null,b]", None, ["task.label_words[0] = None"]),
    ],
)
def test_as_typed_on_the_command_line(typed: str, words: list[str] | None, refused: list[str]) -> None:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose("train", [f"task.label_words={typed}"])
    if words is not None:
        assert load_config(composed).task.label_words == words
    else:
        found = problems_of(composed, Config)
        assert [p.split(":")[0] for p in found] == refused


def test_the_remedy_for_the_command_line_works() -> None:
    for changes, key in (
        ({"label_words": [False, "b"]}, "label_words"),
        ({"name": 5}, "name"),
        ({"source": {"splits": {"train": True}}}, "source"),
        ({"value_words": {"a": {"b": False}}}, "value_words"),
    ):
        [problem] = problems_of(
            {"task": TASK | {"label_words": ["a", "b"]} | changes, "method": {"name": "zero_shot"}}, Config
        )
        typed = problem.partition("on the command line '")[2].removesuffix("')").replace("...", '"b"')
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = compose("train", [f"++{typed}"])
        assert problems_of(composed, Config) == [], key


def test_interpolations_are_texts_of_their_own() -> None:
    found = load_config({"task": TASK | {"label_words": ["a", "b"]}, "method": {"name": "zero_shot"}, "seed": 7,
                         "tracking": {"group": "${seed}"}})  # fmt: skip
    assert found.tracking.group == "7"


def test_a_budget_may_be_a_number() -> None:
    for value, budget in ((1500, "1500"), ("20M", "20M"), (None, None)):
        given = {"task": TASK | {"label_words": ["a", "b"]}, "method": {"name": "zero_shot"}, "budget": value}
        assert load_config(given).budget == budget
    assert problems_of({"task": TASK, "method": {"name": "zero_shot"}, "budget": True}, Config)[0].startswith(
        "budget = True"
    )


def test_a_boolean_that_can_be_but_one_allowed_word_is_that_word() -> None:
    @dataclasses.dataclass
    class Switch:
        probe: str = dataclasses.field(default="auto", metadata={"choices": ("auto", "off")})
        both: str = dataclasses.field(default="no", metadata={"choices": ("no", "off")})

    assert load_config(yaml.safe_load("probe: off"), Switch).probe == "off"
    assert problems_of(yaml.safe_load("probe: on"), Switch) == ["probe = True: allowed are auto, off"]
    assert problems_of(yaml.safe_load("both: off"), Switch) == ["both = False: allowed are no, off"]


def test_settings_laid_over_a_saved_run_and_a_methods_alone() -> None:
    [problem] = unknown_keys({"task": {"label_words": ["a", False]}})
    assert problem.startswith("task.label_words[1] = False: expected text")
    with pytest.raises(ConfigError, match=r"method\.init_text = True: expected text"):
        method_config({"name": "prompt_tuning", "init_text": True})


def word_places(schema: type[Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple[Any, ...]]]:
    """(keys that lead to a setting with a few allowed words, the words)."""
    for f in dataclasses.fields(schema):
        if isinstance(f.default_factory, type) and dataclasses.is_dataclass(f.default_factory):
            if f.name != "method":
                yield from word_places(f.default_factory, (*path, f.name))
        elif words := f.metadata.get("choices"):
            yield (*path, f.name), words


# What YAML's own reader, and so OmegaConf's, makes no text of; Hydra's grammar makes none of true, false and null.
LIKE_A_SWITCH = ("on", "off", "yes", "no", "true", "false", "null", "~", "none")
WORDS = [(schema, *place) for schema in SCHEMAS for place in word_places(schema)]
WORDS = [*WORDS[:3], *(pytest.param(*place, marks=pytest.mark.full) for place in WORDS[3:])]


@pytest.mark.parametrize(("schema", "keys", "words"), WORDS)
def test_allowed_words_need_no_quotes(schema: type[Any], keys: tuple[str, ...], words: tuple[Any, ...]) -> None:
    """Unquoted in a file or typed, every allowed word is itself; what is none of them is named with those that are."""
    name = ".".join(keys)
    for word in (*words, *LIKE_A_SWITCH):
        for read in (OmegaConf.create, yaml.safe_load):
            value = read(f"x: {word}")["x"]
            found = [p for p in problems_of(nested(keys, value), schema) if p.startswith(f"{name} =")]
            if word in words or (value is False and "off" in words):
                assert found == []
            else:
                assert [p.partition(": ")[2] for p in found] == [f"allowed are {', '.join(map(str, words))}"]


@pytest.mark.parametrize("word", ["off", "auto", "false", "'off'"])
def test_a_word_that_yaml_reads_as_a_boolean_in_both_commands(word: str, tmp_path: Path) -> None:
    """`preflight: off` is False in a file that Hydra composes, and a text on the command line."""
    wanted = "auto" if word == "auto" else "off"
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text(f"# @package _global_\npreflight: {word}\n")
    typed = f"preflight={word}"
    for overrides in ([f"hydra.searchpath=[file://{tmp_path}]"], [typed]):
        for command in ("train", "eval"):
            with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
                composed = compose(command, overrides)
            if command == "train":
                assert load_config(composed).preflight == wanted
            else:
                laid = {"task": TASK | {"label_words": ["a", "b"]}, "method": {"name": "zero_shot"}}
                assert load_config({**laid, "preflight": composed.preflight}).preflight == wanted
                assert unknown_keys({"preflight": composed.preflight}) == []
