"""The table of backbones that `scripts/verify_backbones.py` writes: for the preflight, and for people."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import transformers

from tests.backbones import zoo
from tests.backbones.variants import VARIANTS

ROOT = Path(__file__).parents[2]
# Variant or architecture -> status and detail, see `verify.Cell`; "unbuilt" of an architecture as a whole.
Results = dict[str, dict[str, list[str]]]


def shipped(results: Results) -> dict[str, Any]:
    """What `iapt.preflight.known` reads: by model type, the methods all of whose variants are right, and the others
    with the reason. A type of several architectures has to be right on all of them."""
    families: dict[str, dict[str, Any]] = {}
    for name, cells in results.items():
        if "all" in cells:
            continue
        family = families.setdefault(zoo.model_type(name), {"right": [], "refused": {}})
        for variant, (status, detail) in cells.items():
            if status != "right":
                family["refused"].setdefault(VARIANTS[variant].shipped, f"{variant}: {_short(detail)}")
    methods = list(dict.fromkeys(v.shipped for v in VARIANTS.values()))
    for family in families.values():
        family["right"] = [method for method in methods if method not in family["refused"]]
    return {"transformers": transformers.__version__, "families": families}


def document(results: Results) -> str:
    """docs/backbones.md."""
    built = {name: cells for name, cells in results.items() if "all" not in cells}
    counts = Counter(status for cells in built.values() for status, _ in cells.values())
    whole = [name for name, cells in built.items() if {s for s, _ in cells.values()} == {"right"}]
    reasons: dict[str, list[str]] = {}
    lines = [
        "# Backbones",
        "",
        f"What {len(VARIANTS)} method variants do on a small backbone with random weights of every causal LM in "
        f"transformers {transformers.__version__} that can be built small: `make backbones` "
        "(`scripts/verify_backbones.py`) wrote this page and `iapt/verified.json`, which the preflight reads.",
        "",
        "*Right*: the preflight passes, and scores, losses, generated texts, the off-switch and gradients equal a "
        "reference that knows no cache, no padding and no batch (`tests/backbones/reference.py`). *Refused*: attaching "
        "the method or the preflight ends in one line. Weights are random and sizes small: what a pretrained model of "
        "the family adds (other settings in its config, half precision) the preflight sees on the model itself.",
        "",
        f"{counts['right']:,} cells right, {counts['refused']:,} refused, {counts['wrong']} wrong, "
        f"{counts['crashed']} crashed, over {len(built)} architectures; {len(results) - len(built)} were not built.",
        "",
        f"All {len(VARIANTS)} variants are right on: {', '.join(whole) or 'none'}.",
        "",
        "| architecture | right | refused, and why |",
        "|---|---|---|",
    ]
    for name, cells in built.items():
        if name in whole:
            continue
        refused: dict[int, list[str]] = {}
        for variant, (status, detail) in cells.items():
            if status != "right":
                said = reasons.setdefault(_short(detail), [])
                said.append(name)
                note = list(reasons).index(_short(detail)) + 1
                refused.setdefault(note, []).append(variant if status == "refused" else f"**{variant} ({status})**")
        right = sum(s == "right" for s, _ in cells.values())
        shown = "; ".join(
            f"{'all' if len(v) == len(cells) else ', '.join(v)} ({note})" for note, v in sorted(refused.items())
        )
        lines.append(f"| {name} | {right} | {shown} |")
    lines += ["", "## Reasons", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    lines += ["", "## Not built", "", "Nothing is said about these: the sizes that the tests know do not make a small "
              "model of them.", ""]  # fmt: skip
    lines += [f"- {name}: {cells['all'][1]}" for name, cells in results.items() if "all" in cells]
    return "\n".join(lines) + "\n"


def _short(detail: str) -> str:
    """A reason without what differs from model to model."""
    text = detail.split(": method ")[0].split("; ")[0].split(", not for ")[0]
    text = re.sub(
        r"\b\w+(ForCausalLM|LMHeadModel|LMHead|ForConditionalGeneration|GenerationDecoder)\b", "this model", text
    )
    text = re.sub(r"\b[A-Z]\w+(Layer|Block|Attention|MLA)\b", "its layer", text)
    text = re.sub(r"(?<=^method: )\w+(?= (puts|reads|reaches))", "it", text)
    text = re.sub(r" \(model_type=.*| \([\d, ]+\)$", "", text)
    return re.sub(r"(?<![\w.])\d+(\.\d+)?(e[-+]?\d+)?(?![\w-])", "x", text)
