"""A real sweep, tiny as it is, to a report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from iapt.cli import report
from iapt.config.schema import to_dict
from iapt.runs import experiment
from tests.test_experiment import config


def test_two_methods_and_two_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sweep = tmp_path / "sweep"
    values: dict[str, list[float]] = {"iapt": [], "lora": []}
    for method in values:
        for seed in (1, 2):
            folder = sweep / f"{method}-{seed}"
            run_config = config(method=method, seed=seed)
            values[method].append(experiment.run(run_config, folder).test)
            (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(run_config)))
    found = {p: p.read_bytes() for p in sweep.rglob("*") if p.is_file()}
    # A random backbone's weights are drawn with the run's seed.
    allowed = ["--allow-mixed", "backbone_fingerprint"]
    report.run([str(sweep), "--baseline", "lora", "--out", str(tmp_path / "out"), *allowed])
    assert {p: p.read_bytes() for p in sweep.rglob("*") if p.is_file()} == found
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "out" / "cells.csv").open())}
    for method, seeds in values.items():
        assert float(rows[method]["median"]) == pytest.approx(sum(seeds) / 2)
        assert rows[method]["n"] == "2"
    difference = sum(values["iapt"]) / 2 - sum(values["lora"]) / 2
    assert float(rows["iapt"]["difference"]) == pytest.approx(difference), "the predictions reproduce the summaries"
    names = set(json.loads((tmp_path / "out" / "manifest.json").read_text()))
    pictures = ("learning_curves_random", "parameters_random", "cost_random", "activations_iapt_toy-entailment_random")
    assert {f"plots/{name}.png" for name in pictures} <= names
    assert f"{100 * sum(values['iapt']) / 2:.1f}" in capsys.readouterr().out
