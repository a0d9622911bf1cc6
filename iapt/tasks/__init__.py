"""Data -> (instruction, response): a task is one YAML, and this is all that reads it.

Rows become examples through two format strings over the columns. Which rows train, stop and score a run is
the split rule's business; everything random about it hangs on `split_seed` alone, so that five runs of one
task are scored on the same examples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from iapt import metrics
from iapt.config import TaskConfig
from iapt.errors import UserError, suggest
from iapt.tasks.source import Row, load_rows

# The rows that must stay together when splitting (one, or all that share their references), each with the
# split and number it has in the source.
Unit = list[tuple[str, int, Row]]


@dataclass(frozen=True)
class Example:
    """One instruction and what should follow it."""

    instruction: str
    response: str  # what training maximises, without separator
    label: int | None = None  # classification: index of the label word
    references: tuple[str, ...] = ()  # generation: all references of this instruction (>= 1)


@dataclass
class Task:
    """A task's examples, ready to be tokenised."""

    config: TaskConfig
    splits: dict[str, list[Example]]  # "train", "dev", "test"
    fingerprint: str  # of all examples of the three splits, order included
    template_hash: str  # of all that turns a row into text
    notes: list[str]  # what the user should be told

    @property
    def choices(self) -> list[str]:
        """The label words; [] for a generation task."""
        return list(self.config.label_words) if self.config.label_column else []

    def majority(self, split: str) -> float | None:
        """The share of the commonest label in a split (what always answering it scores); None: no labels."""
        if not self.config.label_column:
            return None
        examples = self.splits[split]
        return Counter(example.label for example in examples).most_common(1)[0][1] / len(examples)


def build_task(config: TaskConfig, data_dir: str | None) -> Task:
    """Load a task's rows, split them, and format them.

    Args:
        config: the task.
        data_dir: local files to use instead of the hub, see `iapt.tasks.source.load_rows`.

    Raises:
        UserError: a metric or template that does not fit, a missing column or split, a split with nothing in
            it, a label outside the label words, an empty response, and what `load_rows` raises.
    """
    metrics.check(config.metrics, metrics.CLASSIFICATION if config.label_column else metrics.GENERATION)
    fields = _fields(config)
    units, notes = _split(config, lambda split: _units(config, split, data_dir))
    splits = {}
    for name, members in units.items():
        limit = config.max_train_examples if name == "train" else config.max_eval_examples
        examples = _examples(config, fields, name, members)
        if limit is not None and limit < len(examples):
            notes.append(f"{name}: {limit} of {len(examples)} examples (split_seed {config.split_seed})")
            # The first of one shuffled order: a larger limit keeps every example of a smaller one.
            examples = [examples[i] for i in sorted(_order(config, len(examples))[:limit])]
        splits[name] = examples
    notes += _overlap(splits)
    if config.template != config.template.rstrip() and config.separator:
        notes.append("task.template ends in white space, and the separator comes after it: write |- in YAML")
    return Task(config, splits, _fingerprint(splits), _template_hash(config), notes)


def _order(config: TaskConfig, count: int) -> list[int]:
    order = list(range(count))
    random.Random(config.split_seed).shuffle(order)
    return order


# --- splits -----------------------------------------------------------------------------------------------


def _split(config: TaskConfig, load: Callable[[str], list[Unit]]) -> tuple[dict[str, list[Unit]], list[str]]:
    """The rows of train, dev and test by the task's rule (the series' rules, label S), and a note that says how."""
    rule = config.split_rule
    validation = load("validation")
    shuffled = [validation[i] for i in _order(config, len(validation))]
    if rule == "official":
        units = {"train": load("train"), "dev": validation, "test": load("test")}
        how = "the source's three labelled splits"
    elif rule == "halve_validation":
        half = len(validation) // 2
        units = {"train": load("train"), "dev": shuffled[:half], "test": shuffled[half:]}
        how = f"validation halved into dev and test, split_seed {config.split_seed}"
    elif rule == "carve_train":
        train = load("train")
        if config.carve_size >= len(train):
            raise UserError(f"task.carve_size = {config.carve_size}: must be below the size of train, {len(train)}")
        order = _order(config, len(train))
        carved = set(order[: config.carve_size])
        units = {
            "train": [unit for i, unit in enumerate(train) if i not in carved],
            "dev": [train[i] for i in order[: config.carve_size]],
            "test": validation,
        }
        how = f"{config.carve_size} of train became dev (split_seed {config.split_seed}), validation is test"
    else:
        tenth = len(validation) // 10
        units = {"train": shuffled[2 * tenth :], "dev": shuffled[:tenth], "test": shuffled[tenth : 2 * tenth]}
        how = f"validation alone, cut 80/10/10 with split_seed {config.split_seed}, not the usual protocol"
    for name, members in units.items():
        if not members:
            raise UserError(f"task '{config.name}': split '{name}' is empty under split_rule {rule} ({how})")
    # Training takes every row, the other splits one example per group.
    counts = {n: sum(map(len, members)) if n == "train" else len(members) for n, members in units.items()}
    sizes = ", ".join(f"{name} {count}" for name, count in counts.items())
    return units, [f"{sizes} ({rule}: {how})"]


def _units(config: TaskConfig, split: str, data_dir: str | None) -> list[Unit]:
    key = config.group_references_by
    groups: dict[str, Unit] = {}
    for number, row in enumerate(load_rows(config, split, data_dir), 1):
        if key is not None:
            _need(config, "group_references_by", key, row, f"row {number} of {split}")
        groups.setdefault(str(number if key is None else row[key]), []).append((split, number, row))
    return list(groups.values())


def _overlap(splits: dict[str, list[Example]]) -> list[str]:
    """A word about instructions that a run trains on and is scored on: some data sets repeat themselves."""
    seen = {example.instruction for example in splits["train"]}
    counts = {name: sum(e.instruction in seen for e in splits[name]) for name in ("dev", "test")}
    return [
        f"{name}: {count} of {len(splits[name])} instructions also occur in train"
        for name, count in counts.items()
        if count
    ]


# --- rows to examples -------------------------------------------------------------------------------------


def _fields(config: TaskConfig) -> dict[str, list[str]]:
    """template and response -> the columns each of them names."""
    fields = {}
    for key in ("template", "response"):
        text = getattr(config, key)
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise UserError(f"task.{key} = {text!r}: {error} (a brace as text is written twice)") from None
        # "answers[text][0]" is a lookup inside the column "answers"
        fields[key] = [re.split(r"[.\[]", name)[0] for name in names]
        if "" in fields[key] or any(name.isdigit() for name in fields[key]):
            raise UserError(f"task.{key} = {text!r}: every {{}} must name a column")
    if config.label_column and {"label", config.label_column} & set(fields["template"]):
        raise UserError(f"task.template = {config.template!r}: shows the label in the instruction")
    return fields


def _examples(config: TaskConfig, fields: dict[str, list[str]], split: str, units: list[Unit]) -> list[Example]:
    if split == "train":  # every row by itself, in the source's order
        units = [[member] for member in sorted(itertools.chain(*units), key=lambda member: member[1])]
    made: list[Example] = []
    for unit in units:
        members = [_example(config, fields, row, f"row {number} of {source}") for source, number, row in unit]
        if len(members) > 1:
            references = tuple(member.response for member in members)
            made.append(dataclasses.replace(members[0], references=references))
        else:
            made += members
    return made


def _example(config: TaskConfig, fields: dict[str, list[str]], row: Row, where: str) -> Example:
    values = dict(row)
    label = None
    for column, words in config.value_words.items():
        _need(config, "value_words", column, row, where)
        values[column] = words.get(str(row[column]), row[column])
    if config.label_column:
        _need(config, "label_column", config.label_column, row, where)
        label = _label(config, row[config.label_column], where)
        values["label"] = config.label_words[label]
    texts = {}
    for key, names in fields.items():
        for name in names:
            _need(config, key, name, values, where)
        try:
            texts[key] = getattr(config, key).format(**values)
        except (LookupError, AttributeError, ValueError, TypeError) as error:
            raise UserError(f"task.{key}: does not fit {where} of '{config.name}': {error!r}") from None
    if not texts["response"].strip():
        raise UserError(f"task '{config.name}': empty response in {where}: task.response = {config.response!r}")
    references = () if config.label_column else (texts["response"],)
    return Example(texts["template"], texts["response"], label, references)


def _need(config: TaskConfig, key: str, column: str, row: Row, where: str) -> None:
    if row.get(column) is not None:
        return
    needs = f"task '{config.name}': task.{key} needs column '{column}'"
    if column in row:
        raise UserError(f"{needs}, which is null in {where}")
    raise UserError(f"{needs}, which {where} lacks; {suggest(column, row)}")


def _label(config: TaskConfig, value: Any, where: str) -> int:
    """A label id from an id (csv has it as text) or from a label word."""
    words = config.label_words
    # Text that reads as a number is always an id: COPA's words are "1" and "2", its ids 0 and 1.
    if isinstance(value, str) and not re.fullmatch(r"\s*-?\d+(\.0)?\s*", value):
        if value.strip() in words:
            return words.index(value.strip())
    elif isinstance(value, int | float | str) and float(value) in range(len(words)):
        return int(float(value))
    allowed = ", ".join(f"{i} ({word})" for i, word in enumerate(words))
    hidden = "; -1 is how the hub hides the labels of a test split" if str(value) == "-1" else ""
    raise UserError(
        f"task '{config.name}': {config.label_column} = {value!r} in {where} is outside task.label_words; "
        f"allowed are {allowed}{hidden}"
    )


# --- identity ---------------------------------------------------------------------------------------------


def _fingerprint(splits: dict[str, list[Example]]) -> str:
    digest = hashlib.sha256()
    for name, examples in splits.items():
        for e in examples:
            line = json.dumps([name, e.instruction, e.response, e.label, e.references], ensure_ascii=False)
            digest.update(f"{line}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _template_hash(config: TaskConfig) -> str:
    parts: Sequence[Any] = (
        config.template,
        config.response,
        config.separator,
        config.label_words,
        config.value_words,
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
