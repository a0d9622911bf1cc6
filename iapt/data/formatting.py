"""Rows to examples: format strings over the columns, and a message for every row that does not fit.

A template is what `str.format` takes, with one addition: a list is shown as its items, joined by the text after the
colon, or by a comma and a space: `{table[header]}`, `{options: / }`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from iapt.config.errors import UserError, suggest
from iapt.config.task import TaskConfig
from iapt.data.files import Row
from iapt.data.labels import read_label
from iapt.data.splits import Unit


@dataclass(frozen=True)
class Example:
    """One instruction and what should follow it."""

    instruction: str
    response: str  # what training maximises, without separator
    label: int | None = None  # classification: index of the label word
    references: tuple[str, ...] = ()  # generation: all references of this instruction (>= 1)
    num_choices: int | None = None  # the first so many label words may be answered; None: all of them


_NO_ATTRIBUTES = "{{{}}}: a template reads columns, no attributes; what a column holds under a key is column[key]"


class _Formatter(string.Formatter):
    """`str.format` over rows that may come from a stranger, by templates that may: no attributes, little padding."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        if _reads_attribute(field_name):
            raise ValueError(_NO_ATTRIBUTES.format(field_name))
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None or (isinstance(value, list) and None in value):
            raise ValueError("null within a column")
        if isinstance(value, list):
            return (format_spec or ", ").join(map(str, value))
        if any(len(number) > 3 for number in re.findall(r"\d+", format_spec)):
            raise ValueError(f"the format {format_spec!r} pads to more than 999 characters")
        return str(super().format_field(value, format_spec))


def _reads_attribute(field: str) -> bool:
    return "." in re.sub(r"\[[^\]]*\]", "", field)


def template_fields(config: TaskConfig) -> dict[str, list[str]]:
    """Every template of the task, and its response -> the columns each of them names.

    Raises:
        UserError: a text that is no format string, a field without a column, the label in the instruction.
    """
    fields = {}
    for key, text in _texts(config):
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise UserError(f"task.{key} = {text!r}: {error} (a brace as text is written twice)") from None
        if strange := [name for name in names if _reads_attribute(name)]:
            raise UserError(f"task.{key} = {text!r}: {_NO_ATTRIBUTES.format(strange[0])}")
        # "answers[text][0]" is a lookup inside the column "answers"
        fields[text] = [name.split("[")[0] for name in names]
        if "" in fields[text] or any(name.isdigit() for name in fields[text]):
            raise UserError(f"task.{key} = {text!r}: every {{}} must name a column")
        if key != "response" and config.label_column and {"label", config.label_column} & set(fields[text]):
            raise UserError(f"task.{key} = {text!r}: shows the label in the instruction")
    return fields


def make_examples(config: TaskConfig, fields: dict[str, list[str]], split: str, units: list[Unit]) -> list[Example]:
    """The examples of one split: one a row in train, one a unit elsewhere, with all of its rows' references.

    Args:
        config: the task.
        fields: of `template_fields`.
        split: train, dev or test.
        units: the split's rows.

    Raises:
        UserError: a row that does not fit, named by split and number in the source.
    """
    if split == "train":  # every row by itself, in the source's order
        units = [[member] for member in sorted(itertools.chain(*units), key=lambda member: member[1])]
    made: list[Example] = []
    for unit in units:
        members = [_example(config, fields, row, f"row {number} of {source}") for source, number, row in unit]
        if len(members) > 1:
            references = tuple(reference for member in members for reference in member.references)
            made.append(dataclasses.replace(members[0], references=references))
        else:
            made += members
    return made


def need(config: TaskConfig, key: str, column: str, row: Row, where: str) -> None:
    """Raises UserError if the row lacks a column that `task.key` needs, or has null there."""
    if row.get(column) is not None:
        return
    needs = f"task '{config.name}': task.{key} needs column '{column}'"
    if column in row:
        raise UserError(f"{needs}, which is null in {where}")
    raise UserError(f"{needs}, which {where} lacks; {suggest(column, row)}")


def _texts(config: TaskConfig) -> Iterator[tuple[str, str]]:
    """(the setting, the format string) of the response and of every template."""
    yield "template", config.template
    for column, template in config.templates_without.items():
        yield f"templates_without.{column}", template
    yield "response", config.response


def _example(config: TaskConfig, fields: dict[str, list[str]], row: Row, where: str) -> Example:
    values = dict(row)
    label = num_choices = None
    for column, words in config.value_words.items():
        need(config, "value_words", column, row, where)
        values[column] = words.get(str(row[column]), row[column])
    if config.label_column:
        need(config, "label_column", config.label_column, row, where)
        if config.options_column:
            values["options"], label, num_choices = _options(config, row, where)
        else:
            label = read_label(config, row[config.label_column], where)
        values["label"] = config.label_words[label]
    key, template = _template(config, row, where)
    instruction = _format(config, key, template, fields[template], values, where)
    response = _format(config, "response", config.response, fields[config.response], values, where)
    if not response.strip():
        raise UserError(f"task '{config.name}': empty response in {where}: task.response = {config.response!r}")
    references: tuple[str, ...] = () if config.label_column else (response,)
    if config.references_column:
        references = tuple(map(str, _list(config, "references_column", config.references_column, row, where)))
    return Example(instruction, response, label, references, num_choices)


def _template(config: TaskConfig, row: Row, where: str) -> tuple[str, str]:
    """The setting and the text of the template for this row."""
    for column, template in config.templates_without.items():
        if column not in row:
            need(config, "templates_without", column, row, where)
        if row[column] is None or not str(row[column]).strip():
            return f"templates_without.{column}", template
    return "template", config.template


def _format(config: TaskConfig, key: str, text: str, columns: list[str], values: Row, where: str) -> str:
    for column in columns:
        need(config, key, column, values, where)
    try:
        return _Formatter().vformat(text, (), values)
    except (LookupError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"task.{key}: does not fit {where} of '{config.name}': {error!r}") from None


def _list(config: TaskConfig, key: str, path: str, row: Row, where: str) -> list[Any]:
    """The list at "column" or "column.key", not empty."""
    column, _, rest = path.partition(".")
    need(config, key, column, row, where)
    value = row[column]
    for name in rest.split(".") if rest else []:
        if not isinstance(value, dict) or name not in value:
            raise UserError(f"task '{config.name}': task.{key} = {path}: {where} has no '{name}' in '{column}'")
        value = value[name]
    if not isinstance(value, list) or not value or None in value:
        what = "a list without null" if isinstance(value, list) and value else "a list"
        raise UserError(f"task '{config.name}': task.{key} = {path}: expected {what} in {where}, not {value!r:.60}")
    return value


def _options(config: TaskConfig, row: Row, where: str) -> tuple[str, int, int]:
    """A row's options, one a line with its label word; which of them is right; how many there are."""
    assert config.options_column
    assert config.label_column
    texts, words = _list(config, "options_column", config.options_column, row, where), config.label_words
    if len(texts) > len(words):
        raise UserError(
            f"task '{config.name}': {where} has {len(texts)} options, but task.label_words has {len(words)} words"
        )
    if config.option_names_column:
        names = _list(config, "option_names_column", config.option_names_column, row, where)
        value = row[config.label_column]
        if len(names) != len(texts) or value not in names:
            raise UserError(
                f"task '{config.name}': {config.label_column} = {value!r} in {where} names none of its {len(texts)} "
                f"options; it calls them {', '.join(map(str, names))}"
            )
        label = names.index(value)
    else:
        label = read_label(config, row[config.label_column], where)
    if label >= len(texts):
        raise UserError(f"task '{config.name}': {where} has {len(texts)} options, but its label is {words[label]}")
    shown = "\n".join(f"{word}. {text}" for word, text in zip(words, texts, strict=False))
    return shown, label, len(texts)
