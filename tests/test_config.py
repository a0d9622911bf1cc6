"""The schema: what `load_config` accepts, and that it names everything that is wrong at once."""

import pytest
from omegaconf import OmegaConf

from iapt.config.errors import ConfigError
from iapt.config.schema import Config, to_dict
from iapt.methods.settings import load_config, unknown_keys

GOOD = {"task": {"name": "t", "template": "{x}"}, "method": {"name": "iapt"}}


def problems(**changes: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(OmegaConf.merge(GOOD, changes))
    return caught.value.problems


def test_a_minimal_configuration_gets_the_defaults() -> None:
    config = load_config(GOOD)
    assert isinstance(config, Config)
    assert (config.seed, config.method.num_soft_tokens, config.hardware.precision) == (1, 4, "fp32")
    assert config.task.eval_every == 200


def test_saving_and_loading_gives_the_same_configuration() -> None:
    config = load_config(OmegaConf.merge(GOOD, {"trainer": {"max_steps": 3}, "method": {"bottleneck": 7}}))
    assert load_config(to_dict(config)) == config


def test_interpolations_are_resolved_after_the_defaults_are_there() -> None:
    config = load_config(OmegaConf.merge(GOOD, {"trainer": {"eval_every": "${task.eval_every}"}}))
    assert config.trainer.eval_every == 200
    [problem] = problems(trainer={"eval_every": "${task.eval_evry}"})
    assert "eval_evry" in problem


def test_unknown_keys_come_with_the_nearest_known_one() -> None:
    [problem] = problems(sed=3)
    assert problem.startswith("sed = 3: unknown key; did you mean 'seed'?")
    [problem] = problems(method={"num_tokens": 3})
    assert "method.num_tokens = 3" in problem
    assert "'num_soft_tokens'" in problem
    [problem] = problems(task={"source": {"pth": "x"}})
    assert problem.startswith("task.source.pth = 'x': unknown key; did you mean 'path'?")


def test_every_problem_is_named_at_once() -> None:
    found = problems(
        sed=3,
        zero_shot="perhaps",
        trainer={"max_steps": "many", "batch_size": 0, "learning_rate": -1},
        hardware={"device": "tpu"},
        method={"bottleneck": 1.5},
    )
    starts = (
        "sed = 3: unknown key",
        "zero_shot = 'perhaps': expected bool",
        "trainer.max_steps = 'many': expected int or null",
        "trainer.batch_size = 0: must be at least 1",
        "trainer.learning_rate = -1: must be at least 0",
        "hardware.device = 'tpu': allowed are auto, cpu, cuda",
        "method.bottleneck = 1.5: expected int",
    )
    assert len(found) == len(starts)
    for start in starts:
        assert any(problem.startswith(start) for problem in found), (start, found)


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"backbone": {"kind": "pretrained"}}, "backbone.path = null"),
        ({"backbone": {"kind": "random"}}, "backbone.shape"),
        ({"backbone": {"quantization": "nf4"}, "hardware": {"device": "cpu"}}, "backbone.quantization = nf4"),
        ({"hardware": {"strategy": "fsdp"}}, "hardware.strategy = fsdp"),
        (
            {"method": {"name": "full"}, "hardware": {"strategy": "fsdp", "num_processes": 2}},
            "hardware.strategy = fsdp: shards frozen weights, but method full trains the whole backbone",
        ),
        ({"method": {"name": "full"}, "backbone": {"quantization": "nf4"}}, "backbone.quantization = nf4: method full"),
        ({"hardware": {"gradient_accumulation": 3}, "trainer": {"batch_size": 2}}, "trainer.batch_size = 2"),
        ({"task": {"label_column": "label", "label_words": ["a"]}}, "task.label_words = ['a']"),
        ({"task": {"label_words": ["a", "a"]}}, "task.label_words = ['a', 'a']"),
        ({"task": {"metrics": []}}, "task.metrics = []"),
        ({"trainer": {"learning_rate": 0}}, "trainer.learning_rate = 0"),
        ({"trainer": {"warmup_ratio": 1.5}}, "trainer.warmup_ratio = 1.5"),
        ({"method": {"numerator_degree": 40}}, "method.numerator_degree"),
    ],
)
def test_contradictions_between_fields(changes: dict[str, object], start: str) -> None:
    [problem] = problems(**changes)
    assert problem.startswith(start)


def test_missing_values_unknown_methods_and_values_for_groups() -> None:
    with pytest.raises(ConfigError, match=r"task\.template: missing"):
        load_config({"task": {"name": "t"}, "method": {"name": "iapt"}})
    with pytest.raises(ConfigError, match=r"unknown method; did you mean 'iapt'\?"):
        load_config({"task": GOOD["task"], "method": {"name": "itap"}})
    [problem] = problems(trainer=5)
    assert problem == "trainer = 5: expected a group of settings, not one value"


def test_unknown_keys_of_an_incomplete_configuration() -> None:
    fine = {"data_dir": None, "checkpoint": "x", "task": {"num_beams": 3}}
    assert unknown_keys(fine, also=("checkpoint",)) == []
    found = unknown_keys({"splt": "x", "trainer": {"lr": 3}, "method": {"bottleneck": 3}}, also=("split",))
    assert [p.split(":")[0] for p in found] == ["splt = 'x'", "trainer.lr = 3"]
    assert "did you mean 'split'?" in found[0]
