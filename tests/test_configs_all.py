"""Every YAML file in configs/ composes, passes the schema's check, and builds what it describes."""

import dataclasses
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from iapt.config.paths import CONFIG_DIR
from iapt.config.schema import Config, to_dict
from iapt.data.task import build_task
from iapt.methods.registry import METHODS, spec_of
from iapt.methods.settings import load_config
from iapt.model.backbone import TINY_DIR, build_backbone
from tests import test_task_data

FILES = sorted(p.relative_to(CONFIG_DIR) for p in CONFIG_DIR.rglob("*.yaml") if "local" not in p.parts)
PRIMARY = [Path("eval.yaml"), Path("train.yaml")]
ADAPTERS = {"panda": "init_from", "post": "source"}  # methods that need another run, and the field that names it
TOY_SIZES = {"train": 2000, "dev": 200, "test": 400}
# How many options each group has. Whoever adds a file changes the number here: a file that the walk misses shows.
COUNTS = {"backbone": 6, "debug": 1, "experiment": 25, "hardware": 5, "method": 35, "task": 25, "tracking": 2}


def options(only: str | None = None) -> list[Any]:
    """Every (group, option), or the options of one group."""
    found = [(f.parts[0], f.relative_to(f.parts[0]).with_suffix("").as_posix()) for f in FILES if f not in PRIMARY]
    return found if only is None else [option for group, option in found if group == only]


def needs(group: str, option: str) -> list[str]:
    """What an option needs besides its name: some methods an adapter; `backbone=hf`, which is any model, a path."""
    if option in ADAPTERS:
        return [f"method.{ADAPTERS[option]}=somewhere"]
    any_model = option == "hf" or "override /backbone: hf\n" in (CONFIG_DIR / group / f"{option}.yaml").read_text()
    return [f"backbone.path={TINY_DIR}"] if any_model else []


@cache
def chosen(group: str, option: str) -> Config:
    """The default configuration but for one option."""
    return configuration(f"{group}={option}", *needs(group, option))


def configuration(*overrides: str) -> Config:
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        config = load_config(compose("train", overrides=list(overrides)))
    assert isinstance(config, Config)
    return config


@pytest.mark.parametrize(("group", "option"), [pair for pair in options() if pair[0] != "experiment"])
def test_every_option_composes_and_passes_the_check(group: str, option: str) -> None:
    config = chosen(group, option)
    if group in ("backbone", "task", "method", "tracking"):
        assert getattr(config, group).name == option


def test_the_walk_saw_every_file() -> None:
    assert Counter(group for group, _ in options()) == COUNTS
    files = [p for p in CONFIG_DIR.rglob("*.y*ml") if "local" not in p.parts]
    assert len(files) == len(PRIMARY) + sum(COUNTS.values())


# --- built --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", options("method"))
def test_every_method_is_built_as_large_as_it_says(option: str) -> None:
    config = chosen("method", option)
    backbone, spec = build_backbone(config.backbone), spec_of(config.method)
    expected = spec.count(config.method, backbone)
    assert sum(p.numel() for p in spec.build(config.method, backbone).trainable().values()) == expected


# Published shapes of the backbones on the hub, and their parameters.
LLAMA2 = {"model_type": "llama", "vocab_size": 32000}
HUB_SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "llama2_7b": (
        {**LLAMA2, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        6_738_415_616,
    ),
    "llama2_13b": (
        {**LLAMA2, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
        13_015_864_320,
    ),
    "gemma_2b": (
        {
            "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
            "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
        },
        2_506_172_416,
    ),
}  # fmt: skip
PARAMETERS = {"tiny": 744_576, "hf": 744_576, "random": 46_936_576} | {k: count for k, (_, count) in HUB_SHAPES.items()}


@pytest.mark.parametrize("option", options("backbone"))
def test_every_backbone_is_built(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = chosen("backbone", option).backbone
    if option in HUB_SHAPES:  # the hub's answer: a model of that shape, and any tokenizer
        asked = []
        tokenizer = AutoTokenizer.from_pretrained(TINY_DIR)

        def from_pretrained(path: str, dtype: torch.dtype, **settings: Any) -> Any:
            asked.append(path)
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**HUB_SHAPES[option][0]), dtype=dtype)

        monkeypatch.setattr("iapt.model.backbone.AutoModelForCausalLM.from_pretrained", from_pretrained)
        monkeypatch.setattr(
            "iapt.model.backbone.AutoTokenizer.from_pretrained", lambda path, **_: asked.append(path) or tokenizer
        )
    device = "cpu" if option in ("tiny", "hf") else "meta"  # shapes are enough
    with torch.device(device):
        backbone = build_backbone(config, precision="bf16", device=device)
    assert sum(p.numel() for p in backbone.lm.parameters()) == PARAMETERS[option]
    assert {p.dtype for p in backbone.lm.parameters()} == {torch.bfloat16}
    assert backbone.num_layers == backbone.lm.config.num_hidden_layers
    if option in HUB_SHAPES:
        assert asked == [config.path, config.path]


@pytest.mark.parametrize("option", [option for option in options("task") if option.startswith("toy/")])
def test_every_toy_task_is_built(option: str) -> None:
    task = build_task(chosen("task", option).task, None)
    sizes = {"train": 4000, "dev": 400, "test": 400} if option == "toy/next_sentence" else TOY_SIZES
    assert {split: len(examples) for split, examples in task.splits.items()} == sizes


# A row as the hub has it, and what becomes of it. tests/test_task_data.py has the rows of the other tasks.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "alpaca": (
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
        "Instruction: Sort.\nInput: b a\nResponse:",
        "a b",
    ),
    "arc/challenge": (
        {"question": "Wet?", "choices": {"text": ["sand", "rain"], "label": ["A", "B"]}, "answerKey": "B"},
        "Question: Wet?\nA. sand\nB. rain\nGive the letter of the right option. Answer:",
        "B",
    ),
    "bbh": ({"input": "not True is", "target": "False"}, "Question: not True is\nAnswer:", "False"),
    "e2e": (
        {"meaning_representation": "name[X], food[Y]", "human_reference": "X has Y."},
        "Record: name[X], food[Y]\nWrite a customer review that says all of this. Review:",
        "X has Y.",
    ),
    "glue/qnli": (
        {"question": "Who?", "sentence": "Ana did.", "label": 1},
        "Question: Who?\nSentence: Ana did.\n"
        "Does the sentence hold the answer to the question, entailment or not entailment? Answer:",
        "not entailment",
    ),
    "glue/rte": (
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
        "Premise: It rains.\nHypothesis: It is wet.\n"
        "Does the premise entail the hypothesis, entailment or not entailment? Answer:",
        "entailment",
    ),
    "glue/sst2": (
        {"sentence": "a fine film", "label": 1},
        "Sentence: a fine film\nThe sentiment of this sentence, negative or positive, is:",
        "positive",
    ),
    "mmlu": (
        {"question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1},
        "Question: 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nGive the letter of the right option. Answer:",
        "B",
    ),
    "squad": (
        {"context": "Ana won.", "question": "Who won?", "answers": {"text": ["Ana"], "answer_start": [0]}},
        "Passage: Ana won.\nQuestion: Who won?\nAnswer with words of the passage. Answer:",
        "Ana",
    ),
    "superglue/boolq": (
        {"passage": "Ice floats.", "question": "does ice float", "label": 1},
        "Document: Ice floats.\nQuestion: does ice float?\nAnswer yes or no. Answer:",
        "yes",
    ),
    "superglue/copa": (
        {"premise": "It is wet.", "choice1": "It rained.", "choice2": "It is hot.", "question": "cause", "label": 0},
        "Premise: It is wet.\nChoice 1: It rained.\nChoice 2: It is hot.\n"
        "Question: Which of the two is the cause of the premise, 1 or 2? Answer:",
        "1",
    ),
    "superglue/record": (
        {"passage": "Ana met Leo.", "query": "@placeholder met Leo", "answers": ["Ana"]},
        "Passage: Ana met Leo.\nQuery: @placeholder met Leo\n"
        "Which entity of the passage does @placeholder stand for? Answer:",
        "Ana",
    ),
}


def test_every_task_has_a_row() -> None:
    cases = test_task_data.test_rows_of_the_hubs_form.pytestmark[0].args[1]  # type: ignore[attr-defined]
    elsewhere = [case[0] for case in cases]
    # ppt/ makes its rows itself, from plain text: tests/test_plain_text.py
    hub = [option for option in options("task") if not option.startswith(("toy/", "ppt/"))]
    assert sorted([*ROWS, *elsewhere]) == hub


@pytest.mark.parametrize("option", ROWS)
def test_every_task_is_built_from_a_row_of_the_hubs_form(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(chosen("task", option).task, carve_size=1)
    row, instruction, response = ROWS[option]
    asked = set()

    def load_dataset(path: str, name: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.add((path, split))
        return datasets.Dataset.from_list([row] * 4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for protocol in ("strict", "paper"):
        task = build_task(config, None, protocol)
        for examples in task.splits.values():
            assert (examples[0].instruction, examples[0].response) == (instruction, response)
    assert asked <= {(config.source.path, split) for split in config.official_size}


# --- experiments --------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("option", [option for option in options("experiment") if option != "ppt"])  # no sweep
def test_every_value_of_an_experiments_grid_passes_the_check(option: str) -> None:
    """Not every cell of it, there are hundreds: as many as the longest axis has values, seeds aside."""
    experiment = [f"experiment={option}", *needs("experiment", option)]
    axes = grid(
        yaml.safe_load((CONFIG_DIR / "experiment" / f"{option}.yaml").read_text())["hydra"]["sweeper"]["params"]
    )
    assert all(len(set(values)) == len(values) for values in axes.values())
    assert set(axes) - {"seed"}
    longest = max(len(values) for key, values in axes.items() if key != "seed")
    for i in range(longest):
        cell = {key: values[i % len(values)] for key, values in axes.items()}
        config = configuration(*experiment, *(f"{key}={value}" for key, value in cell.items()))
        for group in {"task", "method", "backbone"} & set(cell):
            assert getattr(config, group).name == cell[group]


def grid(params: dict[str, str]) -> dict[str, list[str]]:
    """Axis -> its values as they are typed, of a sweeper's `params`."""
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    return {
        axis.key_or_group: list(axis.sweep_string_iterator())
        if axis.is_sweep_override()
        else [axis.get_value_element_as_str()]
        for axis in parsed
    }


def test_the_default_is_the_embedded_one() -> None:
    config = configuration()
    assert (config.backbone.name, config.task.name, config.method.name) == ("tiny", "toy/entailment", "iapt")
    assert (config.hardware.device, config.tracking.name, config.data_dir) == ("auto", "none", None)
    assert config.trainer.learning_rate == config.method.learning_rate
    assert config.trainer.max_steps == config.task.max_steps
    assert config.trainer.eval_every == config.task.eval_every


def test_the_defaults_in_train_yaml_are_the_schemas() -> None:
    """Two places say them; a run through Hydra and one through Python must mean the same."""
    composed, plain = configuration().trainer, Config().trainer
    differ = {f.name for f in dataclasses.fields(plain) if getattr(composed, f.name) != getattr(plain, f.name)}
    assert differ <= {"learning_rate", "max_steps", "eval_every"}


def test_the_data_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IAPT_DATA_DIR", "/some/where")
    assert configuration().data_dir == "/some/where"
    assert configuration("data_dir=/else").data_dir == "/else"


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "method").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_methods_yaml_spells_out_every_field(path: Path) -> None:
    spelled = yaml.safe_load(path.read_text())
    kind = spelled.get("kind", spelled["name"])
    schema = METHODS[kind].config
    assert set(spelled) - {"kind"} == {f.name for f in dataclasses.fields(schema)} - {"kind"}
    if "kind" in spelled:  # a choice of settings with a name of its own
        return
    # YAML 1.1 reads 3e-2 as text; what is interpolated has its value from elsewhere.
    values = {key: float(v) if isinstance(v, str) and re.fullmatch(r"\d+e-\d+", v) else v for key, v in spelled.items()}
    wrong = {
        key: (value, getattr(schema(name=kind), key))
        for key, value in values.items()
        if getattr(schema(name=kind), key) != value and not str(value).startswith("${")
    }
    assert not wrong


@pytest.mark.parametrize("name", ["prompt_tuning", "iapt", "bitfit"])
def test_a_run_of_the_schema_alone_trains_at_the_command_lines_rate(name: str) -> None:
    composed = configuration(f"method={name}")
    alone = load_config({"task": to_dict(composed.task), "method": {"name": name}})
    assert alone.trainer.learning_rate == composed.trainer.learning_rate == METHODS[name].config().learning_rate


def test_every_method_ships_a_yaml() -> None:
    files = [yaml.safe_load(path.read_text()) for path in (CONFIG_DIR / "method").glob("*.yaml")]
    assert {spelled.get("kind", spelled["name"]) for spelled in files} == set(METHODS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_says_what_it_is_and_builds_no_objects(path: Path) -> None:
    text = (CONFIG_DIR / path).read_text()
    lines = [line for line in text.splitlines() if not line.startswith("# @")]
    assert lines[0].startswith("# ")
    targets = [line.strip() for line in lines if "_target_" in line]
    assert targets == (["_target_: iapt.cli.callbacks.SweepTable"] if path in PRIMARY else [])


def test_debug_is_short_and_an_experiment_may_say_anything() -> None:
    config = configuration("debug=default")
    assert config.trainer.max_steps is not None
    assert config.trainer.max_steps <= 5
    assert (config.task.max_train_examples or 10**9) <= 100
