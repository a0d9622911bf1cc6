"""What the README tells a newcomer to type does what it says."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_a_task_of_ones_own_needs_one_yaml_and_no_python(tmp_path: Path):
    """The README's ticket task, its text taken from there."""
    block = re.search(r"With `my/task/tickets.yaml`\n\n((?:    .*\n)+)", README)
    command = re.search(r"    iapt-train ('hydra.searchpath=\[file://my\]' task=tickets data_dir=my/data)\n", README)
    assert block
    assert command
    lines = [line[4:] for line in block.group(1).splitlines()]
    assert len(lines) < 15
    (tmp_path / "my" / "task").mkdir(parents=True)
    (tmp_path / "my" / "task" / "tickets.yaml").write_text("\n".join(lines))
    data = tmp_path / "my" / "data" / "tickets"
    data.mkdir(parents=True)
    rows = [("I was charged twice", "billing"), ("The wifi is down", "network"), ("Where is the office?", "other")]
    for split in ("train", "validation", "test"):
        with (data / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "team"), *rows * 4])
    arguments = [a.strip("'") for a in command.group(1).split()]
    steps = ["trainer.max_steps=2", "trainer.eval_every=1", "hydra.run.dir=out"]
    done = subprocess.run(
        [sys.executable, "-m", "iapt.cli.train", *arguments, *steps],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["task"] == "tickets"
    assert summary["majority"] == 1 / 3
    assert "tickets" in done.stdout.splitlines()[-2]
