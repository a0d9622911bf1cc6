"""Differences between two groups of runs on the same test examples: what other seeds and other examples would change.

Test examples are drawn with replacement, the same ones for both groups (Efron and Tibshirani, 1993, An Introduction to
the Bootstrap; for corpus metrics Koehn, EMNLP 2004). Seeds are too few to be drawn: a bootstrap of three of them calls
far too much significant. Their spread enters as in Welch's test instead. The two variances add up, and Student's t has
the degrees of freedom of Satterthwaite, 1946. The spread over seeds holds some of the examples' already, so that this
errs on the side of no difference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from iapt.report.outcomes import Outcomes, outcomes
from iapt.report.runs import Run

Array = NDArray[np.float64]
RESAMPLES, LEVEL, SEED = 2000, 0.05, 0
MIN_SEEDS = 3  # of each group, for a mark: the spread of two is hardly known
CHUNK = 2_000_000  # numbers held at a time
Key = TypeVar("Key")


@dataclass(frozen=True)
class Difference:
    """One group of runs less another, means over seeds, as fractions of 1.

    Attributes:
        value: the observed difference.
        low, high: its interval at 1 - LEVEL, over seeds and examples.
        p: two-sided, of no difference.
        examples: how many test examples were drawn from.
        seeds: of the smaller group.
        adjusted: p after Holm's correction over the table; None where it was not tested, for want of seeds.
    """

    value: float
    low: float
    high: float
    p: float
    examples: int
    seeds: int
    adjusted: float | None = None

    @property
    def significant(self) -> bool:
        """At LEVEL, corrected for the number of differences in the table."""
        return self.adjusted is not None and self.adjusted < LEVEL


Tested = Difference | str  # or why there is none


def difference(one: Sequence[Run], other: Sequence[Run], metric: str, resamples: int = RESAMPLES) -> Tested:
    """The difference of means over seeds, or why there is none."""
    groups = _groups(one, other, metric)
    if isinstance(groups, str):
        return groups
    count, fewest = len(groups[0][0].references), min(map(len, groups))
    if fewest < 2:
        return "one seed does not show how far seeds differ"
    values = [_observed(group) for group in groups]
    one_drawn, other_drawn = (drawn.mean(0) for drawn in _draw(groups, resamples))
    # (variance, its degrees of freedom)
    parts = [(float(v.var(ddof=1)) / len(v), len(v) - 1) for v in values]
    parts.append((float((one_drawn - other_drawn).var(ddof=1)), count - 1))
    value = float(values[0].mean() - values[1].mean())
    margin, p = student(value, parts)
    return Difference(value, value - margin, value + margin, p, count, fewest)


def student(value: float, parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The half width of an interval around `value` at 1 - LEVEL, and the two-sided p of 0.

    Args:
        parts: independent parts of its variance, each with its degrees of freedom.
    """
    variance = sum(v for v, _ in parts)
    if variance == 0:
        return 0.0, float(value == 0)
    freedom = variance**2 / sum(v**2 / n for v, n in parts if v > 0)
    error = math.sqrt(variance)
    return float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error, float(2 * stats.t.sf(abs(value) / error, freedom))


def corrected(tests: Mapping[Key, Tested]) -> dict[Key, Tested]:
    """The same tests, with Holm's correction over all that have at least MIN_SEEDS on either side."""
    from statsmodels.stats.multitest import multipletests  # here: it takes a second

    able = {k: t for k, t in tests.items() if isinstance(t, Difference) and t.seeds >= MIN_SEEDS}
    found = dict(tests)
    if able:
        adjusted = multipletests([t.p for t in able.values()], alpha=LEVEL, method="holm")[1]
        found |= {
            k: dataclasses.replace(t, adjusted=float(p)) for (k, t), p in zip(able.items(), adjusted, strict=True)
        }
    return found


def interval(test: Difference) -> str:
    """As it is printed, in points."""
    return f"{points(test.low)} to {points(test.high)}"


def points(value: float) -> str:
    """A difference of fractions of 1, in points and with its sign."""
    return f"{round(100 * value, 1) + 0.0:+.1f}"  # + 0.0: no -0.0


def explained(than: str) -> str:
    """How marks came about, for the notes below a table; `than`: what the means were compared with."""
    return (
        f"mean over seeds above / below {than}, p < {LEVEL} two-sided after Holm's correction over the table, never "
        f"below {MIN_SEEDS} seeds on either side; p and intervals: Student's t over seeds (Welch) and test examples "
        "(paired bootstrap)"
    )


def _groups(one: Sequence[Run], other: Sequence[Run], metric: str) -> list[list[Outcomes]] | str:
    groups: list[list[Outcomes]] = []
    for runs in (one, other):
        if not runs:
            return "no finished run to compare"
        made = [outcomes(run, metric) for run in runs]
        reasons = [m for m in made if isinstance(m, str)]
        if reasons:
            return reasons[0]
        groups.append([m for m in made if isinstance(m, Outcomes)])
    if len({o.references for group in groups for o in group}) > 1:
        return "not scored on the same test examples"
    return groups


def _observed(group: list[Outcomes]) -> Array:
    return np.array([float(o.value(o.statistics.sum(0))) for o in group])


def _draw(groups: list[list[Outcomes]], resamples: int) -> list[Array]:
    """(seeds, resamples) values for each group; a resample has the same examples everywhere."""
    rng, count = np.random.default_rng(SEED), len(groups[0][0].references)
    found: list[list[list[Array]]] = [[[] for _ in group] for group in groups]
    size = max(1, CHUNK // count)
    for start in range(0, resamples, size):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(size, resamples - start)).astype(float)
        for group, parts in zip(groups, found, strict=True):
            for o, part in zip(group, parts, strict=True):
                part.append(o.value(times @ o.statistics))
    return [np.array([np.concatenate(part) for part in parts]) for parts in found]
