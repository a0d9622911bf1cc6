"""Method variants on small backbones of many families, each against a reference without cache, padding and batch."""

from __future__ import annotations

import pytest

from tests.backbones.verify import verify

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neo",
    "gpt_neox", "gptj", "opt", "falcon", "bloom", "olmo2", "cohere",
)  # fmt: skip
FAST = ("llama", "gpt2", "mixtral")  # rotary and learned positions, and what is refused
# One for each road through the engine and the hooks.
VARIANTS = (
    "zero_shot", "prompt_tuning after", "iapt before", "iapt gated", "prefix_tuning keys_values", "spt layers", "para",
    "LoRA",
)  # fmt: skip
REFUSED = {("mixtral", "para"): "mixture of experts"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.full) for f in FAMILIES])
def test_a_variant_is_what_the_reference_says_or_refused(family: str, variant: str) -> None:
    cell = verify(family, variant)
    reason = REFUSED.get((family, variant))
    assert cell.status == ("refused" if reason else "right"), cell.detail
    assert (reason or "") in cell.detail
