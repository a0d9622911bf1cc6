"""Outcomes by example reproduce every metric, and the bootstrap over them agrees with scipy's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from iapt.metrics import metrics
from iapt.report.bootstrap import Difference, of_medians, paired
from iapt.report.outcomes import Outcomes, outcomes
from iapt.report.runs import Run, read_runs
from tests.report.folders import make_run, write_predictions

TEXTS = [
    "a red dog sleeps here",
    "the old cat runs home today",
    "nobody saw the green bird",
    "7",
    "a bird",
    "the end .",
]


def scored(folder: Path, metric: str, count: int = 30) -> tuple[Run, list[Any], list[Any]]:
    """A run whose predictions are drawn at random, its predictions and references."""
    rng = random.Random(0)
    words = ["no", "maybe", "yes"]
    make_run(folder)
    if metrics.METRICS[metric].kind == metrics.CLASSIFICATION:
        wanted: list[Any] = [rng.randrange(3) for _ in range(count)]
        found: list[Any] = [w if rng.random() < 0.5 else rng.randrange(-1, 3) for w in wanted]
        records = [{"label": f, "text": "", "reference": words[w]} for f, w in zip(found, wanted, strict=True)]
    else:
        wanted = [rng.sample(TEXTS, rng.choice([1, 2])) for _ in range(count)]
        found = [rng.choice(TEXTS) for _ in range(count)]
        records = [{"text": f, "references": w} for f, w in zip(found, wanted, strict=True)]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["task"]["label_words"] = words
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    value = metrics.compute([metric], found, wanted)[metric]
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"metric": metric, "test": value, "metrics": {"test": {metric: value}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return read_runs([folder])[0], found, wanted


@pytest.mark.parametrize("metric", [m for m in metrics.METRICS if m != "meteor"])
def test_a_metric_can_be_had_on_any_resample(tmp_path: Path, metric: str):
    run, found, wanted = scored(tmp_path / "1", metric)
    made = outcomes(run, metric)
    assert isinstance(made, Outcomes), made
    places = np.random.default_rng(0).integers(len(found), size=(3, len(found)))
    places[2] = 0  # one example over and over, so that other labels occur nowhere
    counts = np.array([np.bincount(row, minlength=len(found)) for row in places])
    expected = [metrics.compute([metric], [found[i] for i in row], [wanted[i] for i in row])[metric] for row in places]
    np.testing.assert_allclose(made.value(counts @ made.statistics), expected, atol=1e-9)


@pytest.mark.parametrize("metric", ["bleu", "rouge_l"])
def test_words_are_those_of_the_runs_own_tokenizer(tmp_path: Path, metric: str):
    folder = tmp_path / "1"
    _, found, wanted = scored(folder, metric)
    value = metrics.compute([metric], found, wanted, "char")[metric]
    assert value != metrics.compute([metric], found, wanted)[metric]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["task"]["metric_tokenizer"] = "char"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"test": value, "metrics": {"test": {metric: value}}}))
    made = outcomes(read_runs([folder])[0], metric)
    assert isinstance(made, Outcomes), made
    assert float(made.value(made.statistics.sum(0))) == pytest.approx(value)


def test_labels_inside_a_longer_response(tmp_path: Path):
    folder = make_run(tmp_path / "1", settings={"task.response": "It is {label}."})
    text = (folder / "predictions.jsonl").read_text()
    (folder / "predictions.jsonl").write_text(
        text.replace('"reference": "', '"reference": "It is ').replace('"}', '."}')
    )
    assert isinstance(outcomes(read_runs([folder])[0], "accuracy"), Outcomes)


@pytest.mark.parametrize(
    ("damage", "word"),
    [("none", "no test predictions"), ("other", "summary.json has 0.75"), ("unknown", "answers were expected")],
)
def test_predictions_that_cannot_be_used_say_why(tmp_path: Path, damage: str, word: str):
    folder = make_run(tmp_path / "1")
    if damage == "none":
        (folder / "predictions.jsonl").unlink()
    elif damage == "other":
        write_predictions(folder, [0, 1] * 10, right=3)
    else:
        text = (folder / "predictions.jsonl").read_text()
        (folder / "predictions.jsonl").write_text(text.replace('"reference": "yes"', '"reference": "perhaps"'))
    [run] = read_runs([folder])
    for found in (outcomes(run, "accuracy"), paired([run], [run], "accuracy")):
        assert isinstance(found, str)
        assert word in found


def group(root: Path, rights: list[int], count: int = 200) -> list[Run]:
    for seed, right in enumerate(rights):
        make_run(root / str(seed), seed=seed, right=right, count=count)
    return read_runs([root])


def test_the_paired_interval_is_scipys(tmp_path: Path):
    one, other = group(tmp_path / "a", [150, 156, 162]), group(tmp_path / "b", [140, 146, 150])
    found = paired(one, other, "accuracy", 5000)
    assert isinstance(found, Difference)

    def hits(runs: list[Run]) -> Any:
        return np.mean([[p["text"] == p["reference"] for p in run.predictions] for run in runs], axis=0)

    a, b = hits(one), hits(other)
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis), paired=True, n_resamples=5000, method="percentile", rng=1
    ).confidence_interval
    assert found.value == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert found.significant
    assert found.examples == 200
    # The examples on which the groups differ are the same ones; drawn apart, the interval would be far wider.
    assert found.high - found.low < 0.1


def test_equal_groups_do_not_differ(tmp_path: Path):
    one = group(tmp_path / "a", [150, 156])
    found = paired(one, one, "accuracy")
    assert isinstance(found, Difference)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_no_difference_is_found_too_often(tmp_path: Path):
    """Of 40 pairs of methods that are equally good, about 1 in 20 may be told apart."""
    rng = np.random.default_rng(3)
    found = 0
    for trial in range(40):
        runs = []
        for name in "ab":
            right = rng.random(100) < 0.7
            folder = make_run(tmp_path / f"{trial}{name}", right=int(right.sum()), count=100)
            records = [
                {"label": int(r) if i % 2 else 1 - int(r), "text": "", "reference": ["no", "yes"][i % 2]}
                for i, r in enumerate(right)
            ]
            (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
            runs.append(read_runs([folder]))
        difference = paired(*runs, "accuracy", 500)
        assert isinstance(difference, Difference), difference
        found += difference.significant
    assert found <= 6


def test_the_difference_of_medians_also_draws_seeds(tmp_path: Path):
    one, other = group(tmp_path / "a", [100, 150, 190]), group(tmp_path / "b", [100, 140, 190])
    medians = of_medians(one, other, "accuracy")
    means = paired(one, other, "accuracy")
    assert isinstance(medians, Difference)
    assert isinstance(means, Difference)
    assert medians.value == pytest.approx(0.05)
    assert medians.low < -0.2 < 0.2 < medians.high, "the spread over seeds is in the interval"
    assert means.high - means.low < 0.1


def test_other_examples_are_not_compared(tmp_path: Path):
    one, other = group(tmp_path / "a", [15], 20), group(tmp_path / "b", [15], 30)
    assert paired(one, other, "accuracy") == "not scored on the same test examples"
    assert paired(one, [], "accuracy") == "no finished run to compare"
