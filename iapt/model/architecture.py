"""What transformers' decoder families call their parts: the one place that knows those names.

A name that transformers owns is looked up here, once, in the signature or the modules of the model at hand, and one
that is not found is an error: an argument under a name that a model does not know would be ignored in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from iapt.config.errors import UserError

# Newest first: a release that renames an argument goes on taking the old name for a while, with a warning.
CACHE_NAMES = ("cache", "past_key_values")
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "multi_head_attention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
SUBLAYERS = ("attention", "ffn")
PARTS = ("query", "key", "value", "inner")
_OWN_MAPS = {"query": ("q_proj", "Wq"), "key": ("k_proj", "Wk"), "value": ("v_proj", "Wv")}
_INNER = ("up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h")
_FUSED_INNER = "gate_up_proj"  # Phi-3, GLM: gate and up projection side by side
# Modules in which a boolean mask is True at what is *not* seen.
_TRUE_HIDES = frozenset({"MptAttention"})


# -- the model's own forward pass -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    """The arguments that a forward pass takes, by the names that this release and architecture know.

    Attributes:
        cache: the name of the argument that takes the KV cache.
        positions: whether it takes `position_ids`; models with ALiBi read the mask alone.
        use_cache: whether it takes `use_cache`.
        logits_to_keep: whether it computes the logits of the last columns alone if asked.
    """

    cache: str
    positions: bool
    use_cache: bool
    logits_to_keep: bool


def arguments_of(lm: PreTrainedModel) -> Arguments:
    """How the forward pass of this LM is called.

    Raises:
        UserError: if it takes neither embeddings nor a KV cache under a name that is known here, is an encoder, or
            has layers that look ids up.
    """
    outer, inner = _parameters(lm), _parameters(decoder_of(lm))
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(lm.forward).parameters.values())
    known = outer | inner if passes_on else outer
    kind = type(lm).__name__
    if any(getattr(module, "is_decoder", True) is False for module in decoder_layers(lm).modules()):
        raise UserError(
            f"backbone: {kind} is built as an encoder, whose tokens see what follows them; is_decoder: true in its "
            "config.json makes it a causal LM, if it was trained as one"
        )
    if getattr(text_config(lm), "attention_type", None) == "block_sparse":
        raise UserError(
            f"backbone: {kind} replaces its attention modules while it runs, and what was attached to them with it; "
            "attention_type: original_full in its config.json keeps them"
        )
    if any("input_ids" in _parameters(layer) for layer in decoder_layers(lm)):
        raise UserError(
            f"backbone: layers of {kind} look ids up themselves, and what this engine hands a model are embeddings"
        )
    for name in ("inputs_embeds", "attention_mask"):
        if name not in known:
            raise UserError(f"backbone: {kind}.forward takes no {name}, so nothing can be attached to it")
    cache = next((name for name in CACHE_NAMES if name in outer), None)
    cache = cache or next((name for name in CACHE_NAMES if name in known), None)
    if cache is None:
        raise UserError(
            f"backbone: {kind}.forward takes no KV cache (known names: {', '.join(CACHE_NAMES)}); "
            "models that keep a state of their own kind cannot be continued from an instruction"
        )
    # A wrapper with **kwargs may take what only its decoder names; a decoder that does not name it must not get it.
    return Arguments(cache, "position_ids" in inner & known, "use_cache" in inner & known, "logits_to_keep" in outer)


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)


def is_rewindable(lm: PreTrainedModel) -> bool:
    """Say whether a column can be removed from this model's cache: keys and values can, recurrent states cannot."""
    layers = DynamicCache(config=lm.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def takes_ids_at_every_layer(lm: PreTrainedModel) -> bool:
    """Say whether layers read embeddings of their own besides the hidden states (Gemma 3n, Gemma 4)."""
    return bool(getattr(text_config(lm), "hidden_size_per_layer_input", 0))


def text_config(lm: PreTrainedModel) -> Any:
    """The decoder's part of the config: that of the text model inside, where the model reads pictures as well."""
    return lm.config.get_text_config(decoder=True)


def context_of(lm: PreTrainedModel) -> int | None:
    """The longest sequence the model has positions for, None if it does not say."""
    config = text_config(lm)
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((int(length) for length in found if length), None)


def decoder_of(lm: PreTrainedModel) -> nn.Module:
    """The model without its LM head. Raises UserError if it cannot be told from the model."""
    # An LM whose head is on the same level is its own base model; Llama 4's text model gives its base another name.
    for decoder in (lm.base_model, lm.get_decoder(), getattr(lm, "model", None)):
        if isinstance(decoder, nn.Module) and decoder is not lm:
            return decoder
    raise UserError(f"backbone: found no decoder without its head in {type(lm).__name__}")


def decoder_layers(lm: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in order.

    Raises:
        UserError: if the model has no list of num_hidden_layers modules, or is an encoder-decoder.
    """
    kind, config = type(lm).__name__, text_config(lm)
    if getattr(lm.config, "is_encoder_decoder", False):
        raise UserError(f"backbone: {kind} is an encoder-decoder; decoders alone are supported")
    decoder = lm.get_decoder()
    # A wrapper around several models answers with the language model; an LM without the method, with itself.
    for module in (decoder if isinstance(decoder, nn.Module) else lm).modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            if not module or hasattr(module[0], "out_lin"):  # XLM keeps lists of sublayers instead
                break
            return module
    raise UserError(
        f"backbone: found no list of decoder layers in {kind} (num_hidden_layers = {config.num_hidden_layers})"
    )


# -- inside a layer -------------------------------------------------------------------------------------------


def attention_of(layer: nn.Module) -> nn.Module:
    """A decoder layer's self-attention. Raises UserError for a layer that has none, as recurrent ones."""
    module = _first(layer, ATTENTION)
    if module is None:
        raise UserError(f"backbone: found no self-attention in {type(layer).__name__}")
    return module


def check_keys_and_values(layer: nn.Module) -> None:
    """Raises UserError unless what a layer caches are the keys and values that its heads read."""
    attention = attention_of(layer)
    if _first(attention, ("kv_b_proj",)) is not None:
        raise UserError(
            f"backbone: {type(attention).__name__} caches compressed latents, from which keys and values are made "
            "later, so a method cannot edit them; one that writes soft tokens alone can be used"
        )


@dataclass(frozen=True)
class MaskArgument:
    """The argument by which an attention module is given its mask.

    Attributes:
        signature: of its forward pass.
        states: the argument that holds its input (B, Q, d).
        true_hides: a boolean mask is True at what is not seen, unlike nearly everywhere.
    """

    signature: inspect.Signature
    states: str
    true_hides: bool

    name = "attention_mask"


def mask_argument(attention: nn.Module) -> MaskArgument:
    """Raises UserError if the module takes no mask under the name that is known here."""
    signature = inspect.signature(attention.forward)
    if MaskArgument.name not in signature.parameters:
        raise UserError(f"backbone: {type(attention).__name__}.forward takes no {MaskArgument.name}")
    return MaskArgument(signature, next(iter(signature.parameters)), type(attention).__name__ in _TRUE_HIDES)


def find_sublayers(layer: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The attention and the feed-forward sublayer of a decoder layer.

    Returns:
        For each of `SUBLAYERS` the module that reads the sublayer's input, and the one whose output (B, N, d), or
        the first entry of its tuple, is what the residual sum takes. Mostly one module is both.

    Raises:
        UserError: if one of them is not there, or takes the residual as an argument and does the sum itself.
    """
    found: dict[str, tuple[nn.Module, nn.Module]] = {}
    for sublayer, names in zip(SUBLAYERS, (ATTENTION, FEED_FORWARD), strict=True):
        if (module := _first(layer, names)) is not None:
            found[sublayer] = module, module
    first, last = _first(layer, ("fc1",)), _first(layer, ("fc2",))
    if "ffn" not in found and first is not None and last is not None:
        found["ffn"] = first, last  # OPT has no module around the two
    for sublayer in SUBLAYERS:
        kind = type(layer).__name__
        if sublayer not in found:
            raise UserError(f"backbone: found no {sublayer} sublayer in {kind} to put an adapter on")
        if "residual" in inspect.signature(found[sublayer][1].forward).parameters:
            raise UserError(
                f"backbone: {kind}'s {sublayer} sums with the residual itself, adapters would come too late"
            )
    return found


# -- where queries, keys, values and the feed-forward's inner activations are computed ------------------------


def part_of(layer: nn.Module, part: str) -> tuple[nn.Module, Tensor | None, int]:
    """The linear map of a decoder layer that computes `part`, which columns of its output that is, and how many.

    Args:
        layer: a decoder layer of transformers.
        part: one of `PARTS`.

    Returns:
        The module; the columns (n,) int64 on the CPU, None for all of them; n.

    Raises:
        UserError: if the layer has no such map, or one that computes several parts in an order not known here.
    """
    kind = type(layer).__name__
    refused = UserError(f"backbone: found no {part} projection of its own in {kind}")
    if part == "inner":
        ffn = _first(layer, FEED_FORWARD) or layer  # OPT's stand in the layer itself
        if _first(ffn, ("experts", "router", "gate")) is not None:
            raise UserError(f"backbone: {kind}'s feed-forward is a mixture of experts, which has no one inner map")
        if (module := _first(ffn, _INNER)) is not None:
            return module, None, _width(module)
        if (module := _first(ffn, (_FUSED_INNER,))) is not None:
            half = _width(module) // 2
            return module, torch.arange(half, 2 * half), half
        raise refused
    attention = attention_of(layer)
    # GPT-Neo's and BERT's attention modules hold the module that does the work.
    attention = _first(attention, ("attention", "self")) or attention
    if (module := _first(attention, _OWN_MAPS[part])) is not None:
        if not hasattr(getattr(module, "base_layer", module), "out_features") and not hasattr(module, "nf"):
            raise refused  # a module of several maps, whose output is not one of the four
        return module, None, _width(module)
    if (fused := _FUSED.get(type(attention).__name__)) is None:
        raise refused
    name, layout = fused
    module = getattr(attention, name)
    columns = layout(attention, torch.arange(_width(module)))[part].flatten()
    return module, columns, len(columns)


Layout = Callable[[Any, Tensor], dict[str, Tensor]]


def _side_by_side(attention: Any, columns: Tensor) -> dict[str, Tensor]:
    """[queries, keys, values], equally wide."""
    return dict(zip(PARTS, columns.chunk(3), strict=False))


def _by_head(attention: Any, columns: Tensor) -> dict[str, Tensor]:
    """Each head's query, key and value, head after head."""
    heads = getattr(attention, "num_heads", None) or attention.config.num_attention_heads
    return dict(zip(PARTS, columns.view(heads, 3, -1).unbind(1), strict=False))


def _bigcode(attention: Any, columns: Tensor) -> dict[str, Tensor]:
    """One key and one value behind all queries, or as `_by_head`."""
    if not attention.multi_query:
        return _by_head(attention, columns)
    sizes = [attention.embed_dim, attention.kv_dim, attention.kv_dim]
    return dict(zip(PARTS, columns.split(sizes), strict=False))


def _falcon(attention: Any, columns: Tensor) -> dict[str, Tensor]:
    """Groups of queries with a key and a value each; one key and one value behind all queries; or as `_by_head`."""
    width = attention.head_dim
    if attention.new_decoder_architecture:
        groups = columns.view(-1, attention.num_heads // attention.num_kv_heads + 2, width)
        return {"query": groups[:, :-2], "key": groups[:, -2], "value": groups[:, -1]}
    if not attention.multi_query:
        return _by_head(attention, columns)
    return dict(zip(PARTS, columns.split([len(columns) - 2 * width, width, width]), strict=False))


def _phi3(attention: Any, columns: Tensor) -> dict[str, Tensor]:
    """All queries, fewer keys, as many values."""
    config = attention.config
    shared = config.num_key_value_heads * attention.head_dim
    return dict(zip(PARTS, columns.split([len(columns) - 2 * shared, shared, shared]), strict=False))


def _codegen(attention: Any, columns: Tensor) -> dict[str, Tensor]:
    """Shares (four) of [queries, values, keys], as it was trained on four devices."""
    shares = getattr(attention, "mp_num", 4)  # older releases have it as a number in the forward pass alone
    return dict(zip(("query", "value", "key"), columns.view(shares, 3, -1).unbind(1), strict=True))


# Which module computes several parts at once, and in which order its output holds them. A module that is not listed
# is refused: a guess would scale keys with the values.
_FUSED: dict[str, tuple[str, Layout]] = {
    "GPT2Attention": ("c_attn", _side_by_side),
    "GPTBigCodeAttention": ("c_attn", _bigcode),
    "GPTNeoXAttention": ("query_key_value", _by_head),
    "BloomAttention": ("query_key_value", _by_head),
    "PersimmonAttention": ("query_key_value", _by_head),
    "FalconAttention": ("query_key_value", _falcon),
    "Phi3Attention": ("qkv_proj", _phi3),
    "MptAttention": ("Wqkv", _side_by_side),
    "CodeGenAttention": ("qkv_proj", _codegen),
}


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((child for child in found if isinstance(child, nn.Module)), None)


def _width(module: nn.Module) -> int:
    # transformers' Conv1D calls it nf; peft's layers wrap the map they adapt.
    inner: Any = getattr(module, "base_layer", module)
    return int(getattr(inner, "out_features", None) or inner.nf)
