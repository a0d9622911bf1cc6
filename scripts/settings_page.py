"""Write docs/settings.md: every setting of the commands, from the schemas and the shipped YAMLs.

    python scripts/settings_page.py      # tests/test_docs.py says whether the page is what this would write

A setting's type, default and allowed values come from its dataclass; what it means comes from the comment that stands
beside it there, or else in its YAML. Nothing about a setting is written down a second time.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
import typing
from pathlib import Path
from typing import Any

import yaml

from iapt.benchmarks.harness import HarnessConfig
from iapt.benchmarks.mtbench import MtBenchConfig
from iapt.config.check import type_name
from iapt.config.method import MethodConfig
from iapt.config.paths import CONFIG_DIR
from iapt.config.schema import Config
from iapt.methods.registry import METHODS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """\
# Settings

Made by `scripts/settings_page.py` (`make docs`) from the schemas and the shipped YAMLs: edit those, not this page.

`iapt-train GROUP.KEY=VALUE` sets any of them; `iapt-train --help` lists the choices of every group, and
`iapt-train --cfg job` prints what a command line composes to. `null` stands for "not set". Letters in brackets such as
(S) say what a default rests on: [labels](methods.md#labels).
"""


def comments(text: str) -> dict[int, tuple[str, bool]]:
    """The comments of a Python or YAML text: line -> (words, whether it has the line for itself)."""
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"(\s*|.*\s)#\s?(.*)$", line):
            found[number] = (match[2].strip(), not match[1].strip())
    return found


def _python_comments(source: str) -> dict[int, tuple[str, bool]]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _beside(first: int, last: int, found: dict[int, tuple[str, bool]]) -> str:
    """The comment of what stands on lines `first` to `last`: the lines above it, then the one behind it."""
    above: list[str] = []
    while first - 1 in found and found[first - 1][1]:
        first -= 1
        above.insert(0, found[first][0])
    behind = [found[n][0] for n in range(first + len(above), last + 1) if n in found and not found[n][1]]
    return " ".join([*above, *behind])


def schema_comments(schema: type[Any]) -> dict[str, str]:
    """What the source of a dataclass, and of those that it inherits from, says beside each field."""
    said: dict[str, str] = {}
    for owner in reversed(schema.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(owner))
        [body] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        found = _python_comments(source)
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                said[node.target.id] = _beside(node.lineno, node.end_lineno or node.lineno, found)
    return said


def yaml_comments(path: Path) -> dict[str, str]:
    """What a YAML file says behind each key, by the dotted name of the key; lines above a key are left out."""
    text = path.read_text(encoding="utf-8")
    found, said, parents = comments(text), {}, list[tuple[int, str]]()
    for number, line in enumerate(text.splitlines(), start=1):
        if match := re.match(r"( *)([\w.]+):", line):
            indent = len(match[1])
            parents = [(depth, key) for depth, key in parents if depth < indent] + [(indent, match[2])]
            words, alone = found.get(number, ("", True))
            said[".".join(key for _, key in parents)] = "" if alone else words
    return said


def _shown(value: Any) -> str:
    plain = isinstance(value, str) and value.strip()
    return f"`{value if plain else json.dumps(value, ensure_ascii=False)}`"


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "&lt;")


def _allowed(field: dataclasses.Field[Any], hint: Any) -> str:
    if choices := field.metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in choices)
    minimum = field.metadata.get("minimum")
    return type_name(hint) if minimum is None else f"{type_name(hint)}, at least {minimum}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _is_group(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def rows(
    schema: type[Any], prefix: str, said: dict[str, str], values: dict[str, Any], without: tuple[str, ...] = ()
) -> list[str]:
    """A table's lines for the plain fields of a schema.

    Args:
        schema: the dataclass.
        prefix: of the keys, `trainer.`.
        said: key without the prefix -> what a YAML says of it, used where the schema says nothing.
        values: key without the prefix -> a value that stands in for the schema's default. Where there are any, what
            the YAML says comes first.
        without: fields to leave out.
    """
    hints, own = typing.get_type_hints(schema), schema_comments(schema)
    lines = ["| key | default | takes | |", "|---|---|---|---|"]
    for field in dataclasses.fields(schema):
        default = values.get(field.name, _default(field))
        if _is_group(default) or field.name in without:
            continue
        words = (said.get(field.name) or own[field.name]) if values else (own[field.name] or said.get(field.name, ""))
        cells = (f"`{prefix}{field.name}`", _shown(default), _allowed(field, hints[field.name]), _cell(words))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _summary(schema: type[Any]) -> str:
    return (inspect.getdoc(schema) or "").split("\n\n")[0].replace("\n", " ")


def _inside(group: str, said: dict[str, str]) -> dict[str, str]:
    """What is said of a group's own keys, without the group's name in them."""
    return {key.removeprefix(f"{group}."): words for key, words in said.items() if key.startswith(f"{group}.")}


def _said_in_choices(group: str) -> dict[str, str]:
    """What the shipped choices of a group say of its keys; a task's are about that task."""
    said: dict[str, str] = {}
    for path in sorted((CONFIG_DIR / group).glob("*.yaml")) if group != "task" else ():
        said = {key: words for key, words in yaml_comments(path).items() if words} | said
    return said


def _groups(schema: type[Any], prefix: str, said: dict[str, str]) -> list[str]:
    """A section for each group of settings inside of `schema`, the groups' own groups included."""
    lines: list[str] = []
    for field in dataclasses.fields(schema):
        default = _default(field)
        if _is_group(default) and not isinstance(default, MethodConfig):
            name = f"{prefix}{field.name}"
            inner = _said_in_choices(name) | _inside(name, said)
            lines += [f"## {name}", "", _summary(type(default)), ""]
            lines += [*rows(type(default), f"{name}.", inner, {}), ""]
            lines += _groups(type(default), f"{name}.", said)
    return lines


def _method(path: Path) -> list[str]:
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema = METHODS[given.get("kind") or given["name"]].config
    title = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    said = yaml_comments(path)
    lines = [f"### {path.stem}", "", title, "", *rows(schema, "method.", said, given, without=("name", "kind")), ""]
    options = [f"- `method.{key}`: {words}" for key, words in said.items() if "." in key and words]
    return [*lines, *options, *([""] if options else [])]


def render() -> str:
    """The page."""
    train, scoring = yaml_comments(CONFIG_DIR / "train.yaml"), yaml_comments(CONFIG_DIR / "eval.yaml")
    lines = [HEAD, "## The run", "", *rows(Config, "", train, {}), "", *_groups(Config, "", train)]
    lines += ["## method", "", _summary(MethodConfig), ""]
    lines += [*rows(MethodConfig, "method.", {}, {}), "", "Defaults below are those of `configs/method/NAME.yaml`.", ""]
    for path in sorted((CONFIG_DIR / "method").glob("*.yaml")):
        lines += _method(path)
    lines += ["## iapt-eval", "", "`iapt-eval checkpoint=RUN` takes every key above, and these.", ""]
    lines += ["| key | |", "|---|---|"]
    own = [field.name for field in dataclasses.fields(Config)]
    for key in yaml.safe_load((CONFIG_DIR / "eval.yaml").read_text(encoding="utf-8")):
        if key not in (*own, "defaults", "hydra", "harness", "mt_bench"):
            lines.append(f"| `{key}` | {_cell(scoring[key])} |")
    lines.append("")
    for name, schema in (("harness", HarnessConfig), ("mt_bench", MtBenchConfig)):
        lines += [f"## {name}", "", _summary(schema), "", *rows(schema, f"{name}.", _inside(name, scoring), {}), ""]
        lines += _groups(schema, f"{name}.", scoring)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
