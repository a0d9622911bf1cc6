"""What holds for all tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from absl import logging
from hypothesis import settings
from transformers import AutoConfig, AutoModelForCausalLM

from iapt.cli import eval as eval_command
from iapt.model.backbone import Backbone

# absl, which rouge-score brings, logs to the stderr it finds at its first import, and closes it when Hydra configures
# logging unless it is the process's own. Under pytest it would be the capture's file.
logging.get_absl_handler().python_handler.stream = sys.__stderr__

# The same examples on every machine and every day, however slow the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also what is marked `full`: the whole matrix, for CI")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: runs with --full alone; a like test, or a part of it, runs always")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("full"):
        return
    fast = [item for item in items if item.get_closest_marker("full") is None]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full") is not None])
    items[:] = fast


@pytest.fixture(scope="session")
def llama2_7b() -> Backbone:
    """LLaMA-2 7B's shape without its weights."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=32000, **sizes))
    return Backbone("llama2_7b", lm, None)  # type: ignore[arg-type]


@pytest.fixture
def iapt_eval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """`iapt-eval` in an empty folder: arguments -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["iapt-eval", *args])
        with pytest.raises(SystemExit) as caught:
            eval_command.main()
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return call
