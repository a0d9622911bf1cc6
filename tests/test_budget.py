"""`budget=`: every method as close to one number of trainable parameters as its size setting allows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from iapt.config.errors import ConfigError, UserError
from iapt.config.method import MethodConfig, SizeKnob
from iapt.config.paths import CONFIG_DIR
from iapt.config.schema import Config
from iapt.methods.budget import fit_to_budget, parse_budget
from iapt.methods.registry import METHODS, MethodSpec, register, spec_of
from iapt.methods.settings import load_config
from iapt.model.backbone import Backbone
from tests.contracts.conftest import build_backbone

TASK = {"name": "any", "template": "{text}", "label_column": "label", "label_words": ["no", "yes"]}
METHOD_FILES = sorted((Path(CONFIG_DIR) / "method").glob("*.yaml"))
# Counted module by module, or on a copy: seconds each at this size.
SLOW = ("adalora", "dora", "lora", "pissa", "prefix_tuning", "rslora", "vera")
SHIPPED = [
    pytest.param(path, id=path.stem, marks=pytest.mark.full if path.stem in SLOW else []) for path in METHOD_FILES
]
NEEDS = {"panda": {"init_from": "run"}, "post": {"source": "run"}}


def shipped(path: Path, **settings: Any) -> MethodConfig:
    method = OmegaConf.merge(yaml.safe_load(path.read_text()), NEEDS.get(path.stem, {}), settings)
    config: Config = load_config({"task": TASK, "method": method})
    return config.method


@pytest.mark.parametrize("path", SHIPPED)
def test_every_shipped_method_comes_close_to_20m_on_a_7b_backbone(path: Path, llama2_7b: Backbone):
    config = shipped(path)
    chosen, fitted = fit_to_budget(config, llama2_7b, 20_000_000)
    count = spec_of(config).count
    assert fitted.count == count(chosen, llama2_7b)
    knob = config.size_knob()
    if knob is None:
        assert chosen == config
        assert fitted.knob is None
        assert "no setting decides" in str(fitted)
        return
    assert f"method.{knob.field} = {fitted.value}" in str(fitted)
    # Its neighbours are no closer.
    for value in (fitted.value - knob.step, fitted.value + knob.step):
        if value > 0:
            name, _, key = knob.field.partition(".")
            options = {**getattr(config, name), key: value} if key else value
            other = count(dataclasses.replace(config, **{name: options}), llama2_7b)
            assert abs(other - 20_000_000) >= abs(fitted.count - 20_000_000)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("iapt", {"bottleneck": 320}, 83_927_424),  # 32 (2 d r + 4 r) + 32 x 12: "83.9M" in MiLoRA's table (S)
        ("lora", {"options": {"r": 32}}, 79_953_920),  # seven linear maps: "80.0M" (S)
        ("p_tuning_v2", {"num_soft_tokens": 160}, 20_971_520),  # 32 x 160 d: "20.9M" in ALoRA's table (S)
        ("parallel_adapter", {"bottleneck": 160}, 83_886_080),  # 32 x 2 x 2 d b: "83.9M" (S)
    ],
)
def test_published_sizes_at_llama2_7b(name: str, settings: dict, expected: int, llama2_7b: Backbone):
    config = shipped(Path(CONFIG_DIR) / "method" / f"{name}.yaml", **settings)
    assert spec_of(config).count(config, llama2_7b) == expected
    # And the budget finds the setting from the count.
    knob = config.size_knob()
    assert knob is not None
    chosen, fitted = fit_to_budget(shipped(Path(CONFIG_DIR) / "method" / f"{name}.yaml"), llama2_7b, expected)
    assert (fitted.count, fitted.off) == (expected, 0)
    assert chosen == config


@pytest.mark.parametrize(("name", "asked"), [("iapt", 5_000), ("prompt_tuning", 100), ("idpg", 9_000)])
def test_the_built_module_has_the_size_that_was_said(name: str, asked: int):
    backbone = build_backbone("llama")
    path = Path(CONFIG_DIR) / "method" / f"{name}.yaml"
    chosen, fitted = fit_to_budget(shipped(path), backbone, asked)
    method = spec_of(chosen).build(chosen, backbone)
    assert sum(p.numel() for p in method.trainable().values()) == fitted.count
    assert abs(fitted.off) < 0.7
    assert fitted.record()["off"] == pytest.approx(fitted.count / asked - 1)


def test_a_budget_below_the_smallest_size_gives_the_smallest():
    chosen, fitted = fit_to_budget(METHODS["prompt_tuning"].config(name="prompt_tuning"), build_backbone("llama"), 1)
    assert (chosen.num_soft_tokens, fitted.count) == (1, 32)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20M", 20_000_000), ("1.5b", 1_500_000_000), ("300k", 300_000), ("1500", 1500), ("0.3%", 3_000), (" 2 M ", 2e6)],
)
def test_budgets_are_read(text: str, expected: int):
    assert parse_budget(text, 1_000_000) == expected


@pytest.mark.parametrize("text", ["", "twenty", "20X", "-3M", "0", "0%", "1e6"])
def test_other_texts_are_refused(text: str):
    with pytest.raises(UserError, match=r"budget = .*expected a number of parameters such as 20M"):
        parse_budget(text, 1_000_000)
    with pytest.raises(ConfigError, match="1 problem.*\n.*budget ="):
        load_config({"task": TASK, "budget": text, "method": {"name": "iapt"}})


def test_a_size_that_the_method_rejects_is_an_error():
    @dataclasses.dataclass
    class Narrow(MethodConfig):
        size: int = 1

        def size_knob(self):
            return SizeKnob("size")

        def problems(self):
            return [f"method.size = {self.size}: at most 4"] if self.size > 4 else []

    register("narrow_for_test", MethodSpec(Narrow, lambda c, b: None, lambda c, b: c.size))  # type: ignore[arg-type]
    try:
        config = Narrow(name="narrow_for_test")
        assert fit_to_budget(config, build_backbone("llama"), 3)[0].size == 3  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="budget: method.size = 9 would fit it, but method.size = 9: at most 4"):
            fit_to_budget(config, build_backbone("llama"), 9)
    finally:
        del METHODS["narrow_for_test"]
