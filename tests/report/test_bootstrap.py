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
from iapt.report.bootstrap import Difference, corrected, difference, student
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
    for found in (outcomes(run, "accuracy"), difference([run], [run], "accuracy")):
        assert isinstance(found, str)
        assert word in found


def group(root: Path, rights: list[int], count: int = 200) -> list[Run]:
    for seed, right in enumerate(rights):
        make_run(root / str(seed), seed=seed, right=right, count=count)
    return read_runs([root])


def test_the_spread_over_examples_is_scipys(tmp_path: Path):
    one, other = group(tmp_path / "a", [156] * 3), group(tmp_path / "b", [146] * 3)
    found = difference(one, other, "accuracy", 5000)
    assert isinstance(found, Difference)

    def hits(runs: list[Run]) -> Any:
        return np.mean([[p["text"] == p["reference"] for p in run.predictions] for run in runs], axis=0)

    a, b = hits(one), hits(other)
    theirs = stats.bootstrap((a, b), lambda x, y, axis: (x - y).mean(axis), paired=True, n_resamples=5000, rng=1)
    assert found.value == pytest.approx((a - b).mean())
    assert found.high - found.value == pytest.approx(theirs.standard_error * stats.t.ppf(0.975, 199), rel=0.05)
    assert found.high - found.value == pytest.approx(found.value - found.low)
    assert found.examples == 200
    # The examples on which the groups differ are the same ones; drawn apart, the interval would be far wider.
    assert found.high - found.low < 0.1


def test_the_spread_over_seeds_is_welchs():
    a, b = np.array([0.62, 0.71, 0.66]), np.array([0.80, 0.78, 0.91, 0.85])
    theirs = stats.ttest_ind(a, b, equal_var=False)
    parts = [(v.var(ddof=1) / len(v), len(v) - 1) for v in (a, b)]
    margin, p = student(a.mean() - b.mean(), [*parts, (0.0, 199)])
    assert p == pytest.approx(theirs.pvalue)
    assert margin == pytest.approx((theirs.confidence_interval().high - theirs.confidence_interval().low) / 2)


def test_equal_groups_do_not_differ(tmp_path: Path):
    one = group(tmp_path / "a", [150, 150])
    found = difference(one, one, "accuracy")
    assert isinstance(found, Difference)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_two_seeds_far_apart_are_no_finding(tmp_path: Path):
    """Drawn over examples alone, 75.2 is far below 99.0; what a third seed would give is anyone's guess."""
    one, other = group(tmp_path / "a", [223, 378], 400), group(tmp_path / "b", [396, 397], 400)
    found = corrected({"x": difference(one, other, "accuracy")})["x"]
    assert isinstance(found, Difference)
    assert found.value == pytest.approx(-0.24, abs=0.01)
    assert found.p > 0.3
    assert found.low < -0.5
    assert found.high > 0.5
    assert found.adjusted is None


def test_two_seeds_close_together_are_not_marked_either(tmp_path: Path):
    one, other = group(tmp_path / "a", [100, 100], 400), group(tmp_path / "b", [300, 300], 400)
    found = corrected({"x": difference(one, other, "accuracy")})["x"]
    assert isinstance(found, Difference)
    assert found.p < 0.001
    assert not found.significant
    three = corrected(
        {"x": difference(group(tmp_path / "c", [100] * 3, 400), group(tmp_path / "d", [300] * 3, 400), "accuracy")}
    )
    assert isinstance(three["x"], Difference)
    assert three["x"].significant


def test_one_seed_has_no_interval(tmp_path: Path):
    one, other = group(tmp_path / "a", [15], 20), group(tmp_path / "b", [15, 16, 17], 20)
    assert difference(one, other, "accuracy") == "one seed does not show how far seeds differ"


def test_many_tests_are_corrected_by_holm():
    def made(p: float, seeds: int = 3) -> Difference:
        return Difference(0.1, 0.0, 0.2, p, 100, seeds)

    found = corrected({"a": made(0.01), "b": made(0.02), "c": made(0.03), "d": made(0.0001, 2), "e": "no predictions"})
    adjusted = {key: test.adjusted for key, test in found.items() if isinstance(test, Difference)}
    assert adjusted == {"a": pytest.approx(0.03), "b": pytest.approx(0.04), "c": pytest.approx(0.04), "d": None}
    assert found["e"] == "no predictions"
    alone = corrected({"c": made(0.03)})["c"]
    assert isinstance(alone, Difference)
    assert alone.adjusted == pytest.approx(0.03)


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_no_difference_is_found_too_often(monkeypatch: pytest.MonkeyPatch, spread: float):
    """Of methods whose three seeds come from one distribution, at most 1 in 20 may be told apart.

    Drawing the seeds with replacement would tell about 1 in 5 apart.
    """
    monkeypatch.setattr("iapt.report.bootstrap.outcomes", lambda run, metric: run)
    rng = np.random.default_rng(3)

    def seeds() -> Any:
        rights = rng.random((3, 100)) < np.clip(rng.normal(0.7, spread, (3, 1)), 0, 1)
        return [Outcomes(r.astype(float)[:, None], lambda sums: sums[..., 0] / 100, ("x",) * 100) for r in rights]

    tests = [difference(seeds(), seeds(), "accuracy", 100) for _ in range(400)]
    assert 0 < sum(isinstance(t, Difference) and t.p < 0.05 for t in tests) <= 20


def test_other_examples_are_not_compared(tmp_path: Path):
    one, other = group(tmp_path / "a", [15, 15], 20), group(tmp_path / "b", [15, 15], 30)
    assert difference(one, other, "accuracy") == "not scored on the same test examples"
    assert difference(one, [], "accuracy") == "no finished run to compare"
