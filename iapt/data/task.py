"""Data -> (instruction, response): a task is one YAML, and this package is all that reads it.

Rows become examples through format strings over the columns (`formatting`). Which rows train, stop and score a run is
the split rule's business (`splits`); everything random about it hangs on `split_seed` alone, so that five runs of one
task are scored on the same examples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iapt.config.errors import ConfigError
from iapt.config.task import TaskConfig
from iapt.data import plain_text
from iapt.data.formatting import Example, make_examples, need, template_fields
from iapt.data.labels import decide
from iapt.data.source import load_rows
from iapt.data.splits import Unit, rule_of, shuffled, split
from iapt.metrics import metrics

__all__ = ["Example", "Task", "build_task"]


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


def build_task(config: TaskConfig, data_dir: str | None, protocol: str = "strict") -> Task:
    """Load a task's rows, split them, and format them.

    Args:
        config: the task.
        data_dir: local files to use instead of the hub, see `iapt.data.source.load_rows`.
        protocol: which of the task's split rules holds, see `iapt.data.splits`.

    Raises:
        UserError: a metric or template that does not fit, a missing column or split, a split with nothing in
            it, a label outside the label words or with two meanings, an empty response, and what `load_rows` raises.
    """
    if problems := config.problems():
        raise ConfigError(problems)
    kind = metrics.CLASSIFICATION if config.label_column else metrics.GENERATION
    metrics.check(config.metrics, kind, config.metric_tokenizer)
    fields = template_fields(config)
    words: list[str] = []  # about the rows, found while they are loaded
    units, how = split(config, rule_of(config, protocol), lambda name: _units(config, name, data_dir, words))
    notes = [how, *words]
    if config.label_column and not config.option_names_column:
        rows = (row for members in units.values() for unit in members for _, _, row in unit)
        read = dataclasses.replace(
            config, integer_labels=decide(config, (row.get(config.label_column) for row in rows))
        )
    else:
        read = config
    splits = {}
    for name, members in units.items():
        limit = config.max_train_examples if name == "train" else config.max_eval_examples
        if config.source.builder == "none":
            examples = make_examples(read, fields, name, members)
        else:
            built, note = plain_text.build_rows(config, name, members)
            examples = make_examples(read, fields, name, built)
            notes.append(note)
        if limit is not None and limit < len(examples):
            notes.append(f"{name}: {limit} of {len(examples)} examples (split_seed {config.split_seed})")
            # The first of one shuffled order: a larger limit keeps every example of a smaller one.
            examples = [examples[i] for i in sorted(shuffled(config, len(examples))[:limit])]
        splits[name] = examples
    references = [text for example in splits["test"] for text in example.references]
    notes += _overlap(splits) + metrics.notes(config.metrics, config.metric_tokenizer, references)
    if config.template != config.template.rstrip() and config.separator:
        notes.append("task.template ends in white space, and the separator comes after it: write |- in YAML")
    return Task(config, splits, _fingerprint(splits), _template_hash(config), notes)


def _units(config: TaskConfig, split: str, data_dir: str | None, words: list[str]) -> list[Unit]:
    key, name = config.group_references_by, config.source.splits.get(split, split)
    rows = load_rows(config, split, data_dir)
    official = config.official_size.get(name)
    if official is not None and official != len(rows):
        words.append(f"{name}: {len(rows):,} rows here, {official:,} in the official data set")
    groups: dict[str, Unit] = {}
    skipped = 0
    for number, row in enumerate(rows, 1):
        if any(column in row and _is_empty(row[column]) for column in config.skip_if_empty):
            skipped += 1
            continue
        if key is not None:
            need(config, "group_references_by", key, row, f"row {number} of {split}")
        groups.setdefault(str(number if key is None else row[key]), []).append((split, number, row))
    if skipped:
        words.append(f"{name}: {skipped} rows left out, with nothing in {' or '.join(config.skip_if_empty)}")
    return list(groups.values())


def _is_empty(value: Any) -> bool:
    """Whether there is nothing in a column; 0 and false are something."""
    return value is None or (not value.strip() if isinstance(value, str) else value in ([], {}))


def _overlap(splits: dict[str, list[Example]]) -> list[str]:
    """A word about instructions that a run trains on and is scored on: some data sets repeat themselves."""
    seen = {example.instruction for example in splits["train"]}
    counts = {name: sum(e.instruction in seen for e in splits[name]) for name in ("dev", "test")}
    return [
        f"{name}: {count} of {len(splits[name])} instructions also occur in train"
        for name, count in counts.items()
        if count
    ]


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
        # Left out where they are not set, so that such a task keeps its hash.
        *filter(None, (config.templates_without, config.options_column, config.option_names_column)),
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
