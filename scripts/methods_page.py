"""Write docs/methods.md: every shipped method, from its YAML, its schema and its module's docstring.

    python scripts/methods_page.py      # tests/test_docs.py says whether the page is what this would write

A YAML's first line says what the method is, a line `# Source: ...` where it comes from; equations and choices are what
the docstring of the method's module says. A new method has its place on the page without a word written twice.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import yaml

from iapt.config.method import MethodConfig, SoftPromptConfig
from iapt.config.paths import CONFIG_DIR
from iapt.methods import reference
from iapt.methods.registry import METHODS, MethodSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
KINDS = {
    "soft prompts": "Soft tokens, or what an instruction makes of a pass: the backbone's modules stay as they are, and "
    "adapters of several tasks can share a batch where the [contract](contract.md) says so.",
    "modules and weights": "Trained tensors inside the backbone's own modules.",
    "weights, through peft": "The same, with the layers of [peft](https://github.com/huggingface/peft). Any other "
    "weight-space type of peft's is one more YAML (`kind: peft`, `type: LOHA`, its `options`) and no code.",
    "references": "They train nothing, and are what the others are measured against.",
}
# How a module ends that uses labels; on the page they stand at the top.
LABELS = 'Letters in brackets such as (I) say what a statement rests on: docs/methods.md, "Labels".'
HEAD = """\
# Methods

Made by `scripts/methods_page.py` (`make docs`) from `configs/method/`, the schemas and the modules' docstrings: edit
those, not this page. `iapt-train method=NAME` takes any of them, [settings](settings.md#method) lists what each can be
told, and `budget=20M` sets the one that a method is *sized by* ([budget](first_runs.md#one-budget-for-all)).

## Labels

Not every paper could be read in full, and a port to decoder LMs needs choices that a paper does not make. A letter in
brackets says what a statement rests on:

| label | rests on |
|---|---|
| A | the abstract of the method's paper |
| B | a third party's summary of the paper |
| S | the full text of a sibling paper by the same group: [MiLoRA][] or [ALoRA][] |
| I | our inference: no text says so |
| R | a reconstruction, from a paper's words or from what a reference implementation does, where equations lacked |

Where a choice rests on less than A, the alternative is a setting.

In the formulas *L* is the number of layers, *d* the backbone's width, *n* an instruction's length, *s* the number of
soft tokens, *r* a bottleneck or rank, *E* the token embeddings, *h* the instruction's hidden states ahead of a layer.

[MiLoRA]: https://arxiv.org/abs/2410.18035
[ALoRA]: https://arxiv.org/abs/2403.16187
"""


@dataclass(frozen=True)
class Entry:
    """A shipped method.

    Attributes:
        name: of its YAML.
        what: the YAML's first line.
        source: the paper, "" for none.
        config: its settings as shipped.
        spec: what is registered.
    """

    name: str
    what: str
    source: str
    config: MethodConfig
    spec: MethodSpec

    @property
    def kind(self) -> str:
        """The heading that it stands under."""
        if isinstance(self.config, SoftPromptConfig):
            return "soft prompts"
        if self.module is reference:
            return "references"
        return "weights, through peft" if self.config.kind == "peft" else "modules and weights"

    @property
    def module(self) -> ModuleType:
        """The module that defines its schema, which is the one that explains it."""
        module = inspect.getmodule(type(self.config))
        assert module is not None
        return module


def entries() -> list[Entry]:
    """The shipped methods, by name."""
    found = []
    for path in sorted((CONFIG_DIR / "method").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        sources = [line.removeprefix("Source: ") for line in lines if line.startswith("Source: ")]
        given = yaml.safe_load(text)
        spec = METHODS[given.get("kind") or given["name"]]
        # As shipped, not as checked: some methods need a folder that only a user has.
        config = spec.config(**{key: value for key, value in given.items() if not str(value).startswith("${")})
        found.append(Entry(path.stem, lines[0].rstrip("."), "; ".join(sources), config, spec))
    return found


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _table(members: list[Entry]) -> list[str]:
    lines = ["| `method=` | what it is | sized by | source |", "|---|---|---|---|"]
    for entry in members:
        knob = entry.config.size_knob()
        sized = f"`{knob.field}`" if knob else ""
        lines.append(f"| `{entry.name}` | {entry.what} | {sized} | {_linked(entry.source)} |")
    return lines


def _section(members: list[Entry]) -> list[str]:
    """What a module says of the methods that it holds."""
    module = members[0].module
    said = inspect.cleandoc(module.__doc__ or "").removesuffix(f"\n\n{LABELS}")
    lines = [f"### {', '.join(entry.name for entry in members)}", "", said, ""]
    lines += [f"Code: `{module.__name__.replace('.', '/')}.py`."]
    counts = list(dict.fromkeys(inspect.getdoc(entry.spec.count) or "" for entry in members))
    if members[0].kind != "references":
        lines += ["", "Trainable parameters: " + " ".join(counts)]
    return [*lines, ""]


def render() -> str:
    """The page."""
    found = entries()
    lines = [HEAD]
    for kind, words in KINDS.items():
        members = [entry for entry in found if entry.kind == kind]
        lines += [f"## {kind[0].upper()}{kind[1:]}", "", words, "", *_table(members), ""]
        for module in dict.fromkeys(entry.module for entry in members):
            lines += _section([entry for entry in members if entry.module is module])
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
