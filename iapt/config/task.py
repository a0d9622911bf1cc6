"""The schema of a task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from iapt.config.fields import Role, at_least, choice, setting

PROTOCOLS = ("strict", "paper")
METRIC_TOKENIZERS = ("13a", "intl", "zh", "char", "none", "ja-mecab", "ko-mecab")
_ROW = Role.IDENTITY | Role.ROW
SPLIT_RULES = ("official", "halve_validation", "carve_train", "carve_train_twice", "split_validation")


@dataclass
class SourceConfig:
    """Where rows come from: a hub data set, or one of the embedded generators."""

    path: str | None = None  # hub id
    config: str | None = None  # the hub data set's configuration name
    revision: str | None = None  # branch, tag or commit on the hub
    # configurations on the hub, sub-folders locally: a split is their rows one after another, with a column `subset`
    subsets: list[str] = field(default_factory=list)
    generator: str | None = None  # a function of iapt.data.toy
    # What is asked about rows that are plain text (column `text`); `iapt.data.plain_text` says what each does.
    builder: str = choice("none", "none", "next_sentence", "sentence_choice", "unified_choice", younger=True)
    # Quotation marks in local csv and tsv files. auto: around fields in csv, text in tsv; refused where both could be.
    quotes: str = choice("auto", "auto", "literal", "csv", younger=True)
    splits: dict[str, str] = field(  # our name -> the source's name
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )


@dataclass
class TaskConfig:
    """How rows become instructions, responses and a score. A plain task is this and nothing else."""

    name: str = "???"  # what tables call it, and its folder under data_dir
    source: SourceConfig = field(default_factory=SourceConfig)
    template: str = "???"  # format string over the columns
    response: str = "{label}"  # format string over the columns; {label} is the label word
    separator: str = " "  # stands between instruction and response and belongs to the response's tokens
    label_column: str | None = None  # set: a classification task
    label_words: list[str] = field(default_factory=list)  # index = label id
    # What a label in the data is: one of the words, or the index of one. auto: whichever all rows fit, and refused
    # where they fit both and mean something else by it (words that are numbers).
    integer_labels: str = choice("auto", "auto", "words", "indices", younger=True)
    # column -> {value in the data: wording in the template}
    value_words: dict[str, dict[str, str]] = field(default_factory=dict)
    # column -> the template of the rows in which that column is empty; the first such column counts
    templates_without: dict[str, str] = field(default_factory=dict)
    # multiple choice: the list of a row's options ("choices.text" is `text` in column `choices`). The template shows
    # it as {options}, one a line with its label word; a row with fewer options than there are label words is
    # answered with one of its own.
    options_column: str | None = None
    option_names_column: str | None = None  # what a row calls its options, if label_column holds such a name
    skip_if_empty: list[str] = field(
        default_factory=list
    )  # rows with nothing in such a column are left out, with a word
    references_column: str | None = None  # a row's list of right answers; null: its response is the only one
    group_references_by: str | None = None  # rows equal in this column share their references when scored
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])  # the first is the one reported
    # What bleu and rouge_l count as words. default: each metric's own, made for English and its like (13a, and runs of
    # a-z and 0-9); else a tokenizer of sacrebleu for both: intl for other alphabets, zh or char without blanks
    metric_tokenizer: str = choice(
        "default", "default", *METRIC_TOKENIZERS, role=Role.IDENTITY | Role.AGREE, younger=True
    )
    # One rule for every protocol, or {strict: ..., paper: ...}; `iapt.data.splits` says what each rule does.
    split_rule: Any = "official"
    carve_size: int = at_least(1000, 1)  # rows that a carved split gets
    official_size: dict[str, int] = field(default_factory=dict)  # rows of each of the source's splits, as published
    split_seed: int = 0  # not the run's seed: five seeds of one task are scored on the same examples
    scoring: str = choice("likelihood", "likelihood", "generation", "constrained", role=_ROW)  # for classification
    normalize_scores: bool = setting(False, _ROW)  # divide a label's log-likelihood by its number of tokens
    max_new_tokens: int = at_least(32, 1, _ROW)  # tokens that decoding may write
    num_beams: int = at_least(1, 1, _ROW)  # 1: greedy decoding
    max_train_examples: int | None = at_least(None, 1, _ROW)  # keep so many of train, drawn by split_seed
    max_eval_examples: int | None = at_least(None, 1)  # keep so many of dev and of test, drawn by split_seed
    max_steps: int | None = at_least(None, 1)  # the default of trainer.max_steps
    eval_every: int = at_least(200, 1)  # the default of trainer.eval_every

    def problems(self) -> list[str]:
        """List the contradictions that no single field shows."""
        rule, found = self.split_rule, []
        allowed = f"allowed are {', '.join(SPLIT_RULES)}"
        if isinstance(rule, dict):
            if set(rule) != set(PROTOCOLS):
                found.append(f"task.split_rule = {rule}: needs exactly the keys {', '.join(PROTOCOLS)}")
            wrong = {key: value for key, value in rule.items() if key in PROTOCOLS and value not in SPLIT_RULES}
            found += [f"task.split_rule.{key} = {value!r}: {allowed}" for key, value in wrong.items()]
        elif rule not in SPLIT_RULES:
            found.append(f"task.split_rule = {rule!r}: {allowed}, or one for each of {', '.join(PROTOCOLS)}")
        if self.label_column and len(self.label_words) < 2:
            found.append(f"task.label_words = {self.label_words}: a task with a label_column needs two or more")
        if len(set(self.label_words)) != len(self.label_words):
            found.append(f"task.label_words = {self.label_words}: the words must differ")
        if not self.metrics:
            found.append("task.metrics = []: name at least one metric")
        for key, needed in (("options_column", "label_column"), ("option_names_column", "options_column")):
            if getattr(self, key) and not getattr(self, needed):
                found.append(f"task.{key} = {getattr(self, key)}: needs task.{needed}, which is null")
        if self.references_column and self.label_column:
            found.append(f"task.references_column = {self.references_column}: a task with a label_column has none")
        return found
