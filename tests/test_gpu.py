"""What only a GPU can show. Skipped elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from iapt.runs import experiment
from tests.contracts.conftest import CASES, Case, batch, build_backbone, build_model, examples
from tests.test_experiment import config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_the_gpu_is_reproduced(tmp_path: Path, precision: str):
    changed = config(hardware={"device": "cuda", "precision": precision})
    summary = experiment.run(changed, tmp_path / "run")
    assert summary.peak_memory_bytes > 0
    assert experiment.evaluate(tmp_path / "run", tmp_path / "eval", {}).test == summary.test


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_gpu_equals_cpu(case: Case):
    here, there = build_model(case, "llama"), build_model(case, "llama")
    there.lm.cuda()
    there.method.cuda()
    made = batch(examples())
    torch.testing.assert_close(there.score(made.to("cuda")).cpu(), here.score(made), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra iapt[quantized]")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_backbones_train(tmp_path: Path, kind: str):
    backbone = build_backbone("llama")
    backbone.lm.save_pretrained(tmp_path / "lm")
    backbone.tokenizer.save_pretrained(tmp_path / "lm")
    quantized = {
        "name": "hf",
        "kind": "pretrained",
        "path": str(tmp_path / "lm"),
        "quantization": kind,
        "shape": {},
    }
    changed = config(hardware={"device": "cuda", "precision": "bf16"}, backbone=quantized)
    assert experiment.run(changed, tmp_path / "run").status == "ok"
