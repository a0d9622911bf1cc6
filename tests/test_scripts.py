"""The pretraining script runs end to end, is repeatable, and lowers its loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent


def pretrain(out: Path) -> dict:
    command = [sys.executable, "scripts/pretrain_tiny.py", "--out", str(out), "--steps", "12", "--tokens", "512"]
    done = subprocess.run([*command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout[done.stdout.index("{\n") :])


def test_pretraining_is_repeatable_and_its_folder_loads(tmp_path: Path):
    summary, again = pretrain(tmp_path / "one"), pretrain(tmp_path / "two")
    assert summary["steps"] == 12
    assert summary["probes"] == again["probes"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all((first[key] == second[key]).all() for key in first)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(tmp_path / "one").config.vocab_size
