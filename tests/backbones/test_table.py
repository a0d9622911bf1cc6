"""Every causal LM of transformers is looked into or refused in one line; the shipped table says what is so."""

from __future__ import annotations

import json
import random

import pytest

from iapt.architecture import PARTS, arguments_of, attention_of, decoder_layers, decoder_of, find_sublayers, part_of
from iapt.errors import UserError
from iapt.preflight.known import VERIFIED, known_there
from tests.backbones import zoo
from tests.backbones.table import document, shipped
from tests.backbones.variants import VARIANTS
from tests.backbones.verify import verify

TABLE = json.loads(VERIFIED.read_text(encoding="utf-8"))
BUILT = sorted(TABLE["families"])


@pytest.mark.parametrize("name", BUILT)
def test_what_a_family_calls_its_parts_is_found_or_refused(name: str) -> None:
    lm = zoo.build_lm(name)
    found = 0
    for look in (decoder_layers, decoder_of, arguments_of):
        try:
            look(lm)
            found += 1
        except UserError as error:
            assert "\n" not in str(error)
    if found < 3:
        assert not TABLE["families"][name]["right"]
        return
    for layer in decoder_layers(lm):
        looks = [lambda m: attention_of(m), find_sublayers, *(lambda m, p=part: part_of(m, p) for part in PARTS)]
        for look in looks:
            try:
                look(layer)
            except UserError as error:
                assert "\n" not in str(error)


# Another sample than the families of `test_verify`, the same on every run.
SAMPLE = random.Random(0).sample([(f, v) for f in BUILT for v in VARIANTS], 60)


@pytest.mark.parametrize(("family", "variant"), SAMPLE)
def test_the_shipped_table_is_what_is_measured(family: str, variant: str) -> None:
    cell = verify(family, variant)
    assert cell.status in ("right", "refused"), cell.detail
    if VARIANTS[variant].shipped in TABLE["families"][family]["right"]:
        assert cell.status == "right", cell.detail


def test_the_preflight_reads_the_table() -> None:
    assert known_there("llama", "para").startswith("known to be right there: zero_shot, prompt_tuning")
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
