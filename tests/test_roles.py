"""What every setting matters for: no setting can set runs apart in a sweep and be lost in its report."""

from __future__ import annotations

import dataclasses

import pytest

from iapt.config.fields import Role
from iapt.config.roles import role_of, with_role, younger
from iapt.config.schema import Config, to_dict
from iapt.config.task import TaskConfig
from iapt.runs.sweep import flatten

# What runs of one cell are known by: names, and fingerprints of the weights and of the examples as they are shown.
COVERED = ("backbone", "task", "method.name", "method.kind")
# Two runs that differ in one of these alone are twice the same seed in one cell, which a report refuses.
REFUSED = {"seed", "zero_shot", "hardware.device", "method.learning_rate"}


def test_a_setting_that_makes_a_cell_has_its_place_in_a_report() -> None:
    lost = [
        key
        for key in flatten(to_dict(Config()))
        if Role.IDENTITY in role_of(key)
        and not role_of(key) & (Role.ROW | Role.AGREE)
        and not any(key == name or key.startswith(f"{name}.") for name in COVERED)
    ]
    assert set(lost) == REFUSED


def test_what_may_differ_when_a_run_is_resumed() -> None:
    single = [key for key in with_role(Role.MAY_DIFFER) if not key.startswith(("hardware.", "tracking."))]
    assert single == ["resume", "preflight", "trainer.eval_batch_size", "trainer.log_every", "sweep.retry"]
    groups = {
        f"{name}.{f.name}" for name in ("hardware", "tracking") for f in dataclasses.fields(getattr(Config(), name))
    }
    assert groups <= set(with_role(Role.MAY_DIFFER))


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("data_dir", Role.ELSEWHERE),
        ("method.bottleneck", Role.IDENTITY | Role.ROW),  # the method's own: as its group
        ("method.learning_rate", Role.IDENTITY),
        ("trainer.of_an_older_release", Role.IDENTITY | Role.ROW),
        ("of_an_older_release", Role.IDENTITY),
        ("task.source.splits.train", Role.IDENTITY),
        ("task.num_beams", Role.IDENTITY | Role.ROW),
        ("backbone.shape.hidden_size", Role.IDENTITY),
        ("backbone.quantization", Role.IDENTITY | Role.ROW),
    ],
)
def test_a_field_has_its_own_role_or_its_groups(key: str, role: Role) -> None:
    assert role_of(key) == role


def test_a_younger_setting_is_told_only_where_it_is_not_at_its_default() -> None:
    names = ["task.source.builder", "task.source.quotes", "task.integer_labels", "task.metric_tokenizer"]
    assert list(younger(Config())) == names
    assert list(younger(Config(task=TaskConfig(integer_labels="words", metric_tokenizer="zh")))) == names[:2]
