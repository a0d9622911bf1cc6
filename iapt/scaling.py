"""Where a decoder layer computes queries, keys, values and the feed-forward's inner activations."""

from __future__ import annotations

from torch import nn

PARTS = ("query", "key", "value", "inner")
_NAMES = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "inner": ("up_proj", "fc1", "c_fc"),  # Llama's kind, OPT, GPT-2
}
_FUSED = "c_attn"  # GPT-2: queries, keys and values of equal width, in this order


def part_of(layer: nn.Module, part: str) -> tuple[nn.Module, slice | None, int]:
    """The linear map of a decoder layer that computes `part`, which columns of its output that is, and how many.

    Args:
        layer: a decoder layer of transformers.
        part: one of `PARTS`.

    Returns:
        The module; the columns, None for all of them; their number.

    Raises:
        ValueError: if the layer calls it by no name that is known here.
    """
    for name, module in layer.named_modules():
        own = name.rpartition(".")[2]
        if own in _NAMES[part]:
            return module, None, _width(module)
        if own == _FUSED and part != "inner":
            third = _width(module) // 3
            start = PARTS.index(part) * third
            return module, slice(start, start + third), third
    raise ValueError(f"found no {part} projection in {type(layer).__name__}")


def _width(module: nn.Module) -> int:
    # transformers' Conv1D calls it nf.
    return int(getattr(module, "out_features", None) or module.nf)  # type: ignore[arg-type]
