"""Which rows train, choose and score a run: the split rules, and the protocols that choose among them.

    official            three labelled splits, as the source has them
    carve_train         `carve_size` rows of train become dev, validation is test (the series' rule above 10k rows, S)
    halve_validation    validation halved into dev and test (the series' rule below 10k rows, S)
    carve_train_twice   train is all there is: `carve_size` of its rows become dev, as many become test
    split_validation    validation alone, cut 80/10/10: for partial copies, no published protocol

A task names one rule, or one for each protocol. `strict`: what chooses a checkpoint or trains comes from train, and
the whole labelled validation (or test) split is what is reported. `paper`: the rules of IAPT's series, whose dev and
test are halves of validation where data sets are small.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from iapt.config.errors import UserError
from iapt.config.task import PROTOCOLS, TaskConfig
from iapt.data.files import Row

# The rows that must stay together when splitting (one, or all that share their references), each with the
# split and number it has in the source.
Unit = list[tuple[str, int, Row]]


def rule_of(config: TaskConfig, protocol: str) -> str:
    """The task's split rule under a protocol.

    Raises:
        UserError: a protocol that does not exist.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol = {protocol!r}: allowed are {', '.join(PROTOCOLS)}")
    rule = config.split_rule
    return str(rule[protocol] if isinstance(rule, dict) else rule)


def shuffled(config: TaskConfig, count: int) -> list[int]:
    """0 .. count - 1 in the order that `split_seed` gives."""
    order = list(range(count))
    random.Random(config.split_seed).shuffle(order)
    return order


def split(config: TaskConfig, rule: str, load: Callable[[str], list[Unit]]) -> tuple[dict[str, list[Unit]], str]:
    """The rows of train, dev and test by a rule, and a note that says how.

    Args:
        config: the task.
        rule: one of `iapt.config.schema.SPLIT_RULES`.
        load: returns the units of the source's train, validation or test.

    Raises:
        UserError: a split with nothing in it, a `carve_size` that leaves nothing to train on, and what `load` raises.
    """
    seed, validation = config.split_seed, config.source.splits.get("validation", "validation")
    if rule == "official":
        units = {"train": load("train"), "dev": load("validation"), "test": load("test")}
        how = "the source's three labelled splits"
    elif rule == "halve_validation":
        both = _in_order(config, load("validation"))
        half = len(both) // 2
        units = {"train": load("train"), "dev": both[:half], "test": both[half:]}
        how = f"{validation} halved into dev and test, split_seed {seed}"
    elif rule == "carve_train":
        test = load("validation")
        train, [dev] = _carve(config, load("train"), 1)
        units = {"train": train, "dev": dev, "test": test}
        how = f"{config.carve_size} of train became dev (split_seed {seed}), test is the source's {validation}"
    elif rule == "carve_train_twice":
        train, [dev, test] = _carve(config, load("train"), 2)
        units = {"train": train, "dev": dev, "test": test}
        how = f"{config.carve_size} of train became dev and as many test, split_seed {seed}"
    else:
        every = _in_order(config, load("validation"))
        tenth = len(every) // 10
        units = {"train": every[2 * tenth :], "dev": every[:tenth], "test": every[tenth : 2 * tenth]}
        how = f"{validation} alone, cut 80/10/10 with split_seed {seed}, not the usual protocol"
    for name, members in units.items():
        if not members:
            raise UserError(f"task '{config.name}': split '{name}' is empty under split_rule {rule} ({how})")
    # Training takes every row, the other splits one example per group.
    counts = {n: sum(map(len, members)) if n == "train" else len(members) for n, members in units.items()}
    sizes = ", ".join(f"{name} {count}" for name, count in counts.items())
    return units, f"{sizes} ({rule}: {how})"


def _in_order(config: TaskConfig, units: list[Unit]) -> list[Unit]:
    return [units[i] for i in shuffled(config, len(units))]


def _carve(config: TaskConfig, train: list[Unit], parts: int) -> tuple[list[Unit], list[list[Unit]]]:
    """What is left of train, in its own order, and `parts` times `carve_size` units drawn from it."""
    size = config.carve_size
    if parts * size >= len(train):
        times = "" if parts == 1 else f"{parts} times that "
        raise UserError(f"task.carve_size = {size}: {times}must be below the size of train, {len(train)}")
    order = shuffled(config, len(train))
    carved = set(order[: parts * size])
    left = [unit for i, unit in enumerate(train) if i not in carved]
    return left, [[train[i] for i in order[part * size : (part + 1) * size]] for part in range(parts)]
