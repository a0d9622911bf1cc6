"""What a command imports before it has said anything; how long that takes is for scripts/bench_start.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each costs a good part of a second.
HEAVY = {
    "torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "evaluate", "pandas", "pyarrow", "numpy",
    "scipy", "sklearn", "statsmodels", "matplotlib", "plotly", "wandb", "nltk", "sacrebleu", "lm_eval", "optuna",
}  # fmt: skip
# Of these a run on local data needs none, nor does a run that nothing tracks.
SELDOM = {"datasets", "evaluate", "wandb", "plotly", "statsmodels", "lm_eval", "optuna", "nltk", "sacrebleu"}
IMPORTED = "print(*sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)"


def imported(code: str, *arguments: str, folder: Path) -> set[str]:
    """The top-level modules that stand on the last line of what `code` writes to stderr."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": "iapt-train method=", "COMP_POINT": "18"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *arguments], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = set(done.stderr.splitlines()[-1].split())
    assert "sys" in found
    return found


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", "--help"),
        ("train", "--cfg job"),
        ("train", "-sc query=bash"),
        ("train", "--info searchpath"),
        ("eval", "--help"),
        ("eval", "--cfg job"),
        ("report", "--help"),
    ],
)
def test_what_shows_help_or_settings_imports_nothing_heavy(command: str, arguments: str, tmp_path: Path) -> None:
    code = f"from iapt.cli.{command} import main\ntry: main()\nfinally: {IMPORTED}"
    assert imported(code, *arguments.split(), folder=tmp_path) & HEAVY == set()


def test_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    assert imported(f"import iapt; {IMPORTED}", folder=tmp_path) & HEAVY == set()


def test_a_runs_first_line_comes_before_anything_heavy(tmp_path: Path) -> None:
    code = f"""
from iapt.cli import train
def loading(*what):
    print(*what, file=sys.stderr); {IMPORTED}; sys.exit()
train.loading = loading
train.main()"""
    assert imported(code, "task=glue/rte", "method=lora", folder=tmp_path) & HEAVY == set()


def test_a_run_imports_what_it_needs(tmp_path: Path) -> None:
    """From start to end, its own processes excepted."""
    code = f"from iapt.cli.train import main\ntry: main()\nfinally: {IMPORTED}"
    settings = ("method=prompt_tuning", "trainer.max_steps=1", "zero_shot=false", "preflight=off")
    sizes = ("task.max_train_examples=8", "task.max_eval_examples=8", f"hydra.run.dir={tmp_path}/run")
    found = imported(code, *settings, *sizes, folder=tmp_path)
    assert {"torch", "transformers"} <= found
    assert found & SELDOM == set()
