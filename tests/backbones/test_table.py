"""Every causal LM of transformers is looked into or refused in one line; the shipped table says what is so."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import transformers
from torch import nn

from iapt.config.errors import UserError
from iapt.model.architecture import (
    PARTS,
    arguments_of,
    attention_of,
    decoder_layers,
    decoder_of,
    find_sublayers,
    part_of,
)
from iapt.preflight.known import VERIFIED, known_there
from tests.backbones import zoo
from tests.backbones.table import document, shipped
from tests.backbones.variants import VARIANTS
from tests.backbones.verify import verify

TABLE = json.loads(VERIFIED.read_text(encoding="utf-8"))
# Other releases in the range may lack a family of the one that the table was measured on, and a family may be another
# model there (RoFormer's attention sees what follows in 5.17): then it is refused, which is all that is asked of them.
MEASURED_HERE = transformers.__version__ == TABLE["transformers"]
BUILT = sorted(name for name in TABLE["families"] if zoo.is_known(name))


@pytest.mark.full
@pytest.mark.parametrize("name", BUILT)
def test_what_a_family_calls_its_parts_is_found_or_refused(name: str) -> None:
    try:
        lm = zoo.build_lm(name)
    except Exception as error:
        if MEASURED_HERE:
            raise
        pytest.skip(f"transformers {transformers.__version__} cannot build it: {type(error).__name__}")
    if not all(_found(look, lm) for look in (decoder_layers, decoder_of, arguments_of)):
        assert not (MEASURED_HERE and TABLE["families"][name]["right"])
        return
    for layer in decoder_layers(lm):
        for look in (attention_of, find_sublayers, *(partial(_part, part) for part in PARTS)):
            _found(look, layer)


def _part(part: str, layer: nn.Module) -> Any:
    return part_of(layer, part)


def _found(look: Callable[[Any], Any], module: nn.Module) -> bool:
    """Whether it is found; what is not found has to be refused in one line."""
    try:
        look(module)
    except UserError as refused:
        said = str(refused)
    else:
        return True
    assert "\n" not in said
    return False


# Another sample than the families of `test_verify`, the same on every run.
SAMPLE = random.Random(0).sample([(f, v) for f in BUILT for v in VARIANTS], 60)


@pytest.mark.full
@pytest.mark.parametrize(("family", "variant"), SAMPLE)
def test_the_shipped_table_is_what_is_measured(family: str, variant: str) -> None:
    cell = verify(family, variant)
    assert cell.status in ("right", "refused"), cell.detail
    if MEASURED_HERE and VARIANTS[variant].shipped in TABLE["families"][family]["right"]:
        assert cell.status == "right", cell.detail


def test_the_preflight_reads_the_table() -> None:
    release = TABLE["transformers"]
    assert known_there("llama", "para").startswith(
        f"known to be right there (transformers {release}): zero_shot, prompt_tuning"
    )
    assert "it is known not to work there (para: " in known_there("mixtral", "para")
    assert known_there("no_such_model", "iapt") == "no method was tested there"


def test_a_type_has_to_be_right_on_all_its_architectures() -> None:
    right, refused = {v: ["right", ""] for v in VARIANTS}, {v: ["refused", "why: not; x"] for v in VARIANTS}
    results = {
        "falcon": right,
        "falcon-alibi": {**right, "para": ["refused", "why; not"]},
        "blt": {"all": ["unbuilt", "large"]},
    }
    families = shipped(results)["families"]
    assert set(families) == {"falcon"}
    assert families["falcon"]["refused"] == {"para": "para: why"}
    assert "para" not in families["falcon"]["right"]
    assert len(families["falcon"]["right"]) == len({v.shipped for v in VARIANTS.values()}) - 1
    page = document({**results, "mamba": refused})
    assert "All 25 variants are right on: falcon." in page
    assert "| mamba | 0 | all (2) |" in page
    assert "- blt: large" in page
