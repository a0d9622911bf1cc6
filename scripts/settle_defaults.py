"""IAPT's open choices, measured: one switch at a time, several tasks, several seeds.

python scripts/settle_defaults.py outputs/settle                                        # the embedded tasks
python scripts/settle_defaults.py outputs/settle --task glue/sst2 --set data_dir=DIR --set backbone=hf \
    --set backbone.path=FOLDER --set trainer.max_steps=150 --set ++task.max_train_examples=8000
python scripts/settle_defaults.py outputs/settle --table > table.md                     # what is there so far

Every cell is an ordinary run folder below the output folder; finished cells are not run again, so an interrupted
call continues where it stopped. The table gives median (smallest to largest) over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from iapt.config.paths import CONFIG_DIR
from iapt.folder.summary import read_summary
from iapt.methods.settings import load_config
from iapt.runs.experiment import run

# What all rows share but for their own switch. The rate is not the default: at 1e-6 the activations hardly move in so
# few steps, and their training modes could not differ.
BASE = ["method.position=before_instruction", "method.activation_learning_rate=1e-4"]
VARIANTS = {
    "point of comparison": [],
    "position: after_instruction": ["method.position=after_instruction"],
    "input not normalised": ["method.normalize_input=false"],
    "output start: gated": ["method.output_start=gated"],
    "activation: paper (held-out = dev)": ["method.activation_training=paper"],
    "activation: joint": ["method.activation_training=joint"],
    "activation: frozen": ["method.activation_training=frozen"],
    "activation: rate 1e-6": ["method.activation_learning_rate=1e-6"],
    "activation: rate 1e-3": ["method.activation_learning_rate=1e-3"],
}
TASKS = ("toy/entailment", "toy/sentiment", "toy/describe")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", nargs="+", default=TASKS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--set", action="append", default=[], help="a further override, for every run")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.table:
        for seed in options.seeds:  # all variants of a seed first: an interrupted call leaves a comparable table
            for task in options.task:
                for variant in options.variants:
                    _cell(options.folder, task, variant, seed, [*BASE, *VARIANTS[variant], *options.set])
    print(table(options.folder))


def _cell(root: Path, task: str, variant: str, seed: int, overrides: list[str]) -> None:
    folder = root / task.replace("/", "-") / _slug(variant) / str(seed)
    if read_summary(folder).finished:
        return
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose("train", [f"task={task}", "method=iapt", f"seed={seed}", "zero_shot=false", *overrides])
    run(load_config(composed), folder)


def _slug(variant: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in variant)


def table(root: Path) -> str:
    """Markdown: a row a variant, for every task found its test score and its best dev loss."""
    tasks = sorted(p.name for p in root.iterdir() if p.is_dir())
    head = ["", *(f"{t}: {what}" for t in tasks for what in ("test", "dev loss"))]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for variant in VARIANTS:
        cells = [variant]
        for task in tasks:
            found = [read_summary(p) for p in sorted((root / task / _slug(variant)).glob("*"))]
            found = [s for s in found if s.finished]
            cells += [
                _spread((100 * s.test for s in found if s.test is not None), 1),
                _spread((s.best_dev_loss for s in found), 4),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    counts = {len(list((root / t / _slug(v)).glob("*/summary.json"))) for t in tasks for v in VARIANTS}
    return "\n".join([*lines, "", f"Runs a cell: {', '.join(map(str, sorted(counts)))}."])


def _spread(values: Iterable[Any], digits: int) -> str:
    found = sorted(values)
    if not found:
        return "not run"
    return f"{statistics.median(found):.{digits}f} ({found[0]:.{digits}f}–{found[-1]:.{digits}f})"


if __name__ == "__main__":
    main()
