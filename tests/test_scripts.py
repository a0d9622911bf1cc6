"""The scripts run end to end and say what they are to say; pretraining is repeatable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.shipped import TOKENIZERS

ROOT = Path(__file__).resolve().parent.parent


def pretrain(out: Path) -> dict:
    command = [sys.executable, "scripts/pretrain_tiny.py", "--out", str(out), "--steps", "12", "--tokens", "512"]
    done = subprocess.run([*command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout[done.stdout.index("{\n") :])


@pytest.mark.full
def test_pretraining_is_repeatable_and_its_folder_loads(tmp_path: Path):
    summary, again = pretrain(tmp_path / "one"), pretrain(tmp_path / "two")
    assert summary["steps"] == 12
    assert summary["probes"] == again["probes"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all((first[key] == second[key]).all() for key in first)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(tmp_path / "one").config.vocab_size


def test_the_shipped_tokenizers_are_what_their_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "scripts/train_tokenizers.py", str(tmp_path)], cwd=ROOT, check=True)
    files = {path.relative_to(TOKENIZERS) for path in TOKENIZERS.rglob("*.*")}
    assert files == {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")}
    likelihoods = Path("unigram/tokenizer.json")  # in an order of chance, and rounded by it
    for file in files - {likelihoods}:
        assert (tmp_path / file).read_text() == (TOKENIZERS / file).read_text(), file
    made, shipped = (json.loads((folder / likelihoods).read_text()) for folder in (tmp_path, TOKENIZERS))
    pieces, expected = (dict(whole["model"].pop("vocab")) for whole in (made, shipped))
    assert pieces == pytest.approx(expected, abs=0.01)
    assert made == shipped


@pytest.mark.full
def test_the_preflight_is_set_against_a_step() -> None:
    command = [sys.executable, "scripts/bench_preflight.py", "--repeats", "1", "method=lora", "hardware=cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["backbone"], found["method"], found["device"], found["batch"]) == ("tiny", "lora", "cpu", 16)
    assert found["ratio"] == pytest.approx(found["preflight_seconds"] / found["step_seconds"], rel=0.02)
    done = subprocess.run([*command, "method=zero_shot"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "method = zero_shot: trains nothing, so there is no step to take\n")


def test_rational_fits_are_what_their_script_makes(tmp_path: Path):
    made, stored = tmp_path / "fits.json", json.loads((ROOT / "iapt/nn/rational_fits.json").read_text())
    command = [sys.executable, "scripts/fit_rational.py", "--out", str(made), "--functions", "silu"]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    again = json.loads(made.read_text())
    assert again["range"] == stored["range"]
    assert set(again["fits"]["silu"]) == {"6/5", "5/4"}
    for degrees, fit in again["fits"]["silu"].items():
        for key, value in stored["fits"]["silu"][degrees].items():
            assert fit[key] == pytest.approx(value, rel=1e-4, abs=1e-7)


@pytest.mark.full
@pytest.mark.parametrize("what", ["train", "decode"])
def test_the_bench_measures_everyone_and_writes_what_it_prints(what: str, tmp_path: Path):
    command = [sys.executable, "scripts/bench.py", what, "--shape", "iapt/tiny", "--batch", "2", "--instruction", "6"]
    sizes = ["--response", "2", "--adapters", "2", "--rounds", "2", "--warmup", "0", "--json", str(tmp_path / "t.json")]
    done = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True, check=True)
    report = json.loads((tmp_path / "t.json").read_text())
    names = [row["method"] for row in report["rows"]]
    assert len(names) == len(set(names)) >= 6
    assert all(len(rival["seconds"]) == 2 for rival in report["measured"])
    assert all(f"| {name} | " in done.stdout for name in names)
