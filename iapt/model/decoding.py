"""What decoding obeys: the options it is called with, and nothing that a backbone brings along.

A model's generation_config.json, or what transformers derives from config.json in its place, says how its makers like
to decode: penalties, beams, a cache of another kind. It would change results without a word, so `generate` runs on a
generation config made here. Only which tokens end a text is taken from the backbone (`end_tokens`).

Decoding continues a cache that already holds the instruction, soft tokens included. transformers is given the
instruction's real ids all the same, and only the last of them runs: whatever reads ids (penalties, lengths, stopping
criteria, streamers, functions of the caller's own) sees what it sees in plain transformers. What cannot work so is
refused by name, an option that is not known here as well: one that a new release adds might act on the prompt.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from iapt.config.errors import UserError, suggest
from iapt.model.backbone import Backbone

# Options of `GenerationConfig` that act as in plain transformers on the whole prompt.
WORKING = frozenset({
    # lengths and ends
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "early_stopping",
    "eos_token_id", "pad_token_id",
    # beams and samples
    "do_sample", "num_beams", "num_return_sequences", "length_penalty", "temperature", "top_k", "top_p", "min_p",
    "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    # what scores are changed by
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values", "renormalize_logits",
    "watermarking_config",
    # what is returned
    "output_scores", "output_logits", "return_dict_in_generate",
    # without effect in plain transformers too: prompts have their own first token, and our caches are not compiled for
    "bos_token_id", "disable_compile", "compile_config",
})  # fmt: skip

# Arguments of `generate` itself that are handed on as they are.
ARGUMENTS = frozenset(
    {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "synced_gpus", "tokenizer"}
)

_CACHE = "the instruction is run into a cache of its own before decoding starts"
_DRAFTS = "checking several drafted tokens at once would need soft tokens in the drafts as well"
_HUB = "transformers has moved this way of decoding out, into code that is downloaded and replaces `generate`"
_ENCODER = "it belongs to encoder-decoder models"
_STATES = "the instruction's states and attention come from passes before decoding, and hold soft tokens"
_GUIDANCE = "it runs the backbone on a second prompt, which has no soft tokens"

# What cannot work behind a cache with soft tokens in it, and why: options of `GenerationConfig` and arguments of
# `generate`. Each may be given with a value that leaves it off.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size",
            "continuous_batching_config",
        ),
        _CACHE,
    ),
    "token_healing": "it rewrites the instruction's end, which has run by then",
    **dict.fromkeys(("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"), _GUIDANCE),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), _STATES),
    "decoder_start_token_id": _ENCODER,
    **dict.fromkeys(
        (
            "assistant_model", "assistant_tokenizer", "is_assistant", "use_mtp", "speculation_type",
            "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
            "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
            "prompt_lookup_num_tokens", "max_matching_ngram_size",
        ),
        _DRAFTS,
    ),
    **dict.fromkeys(
        (
            "penalty_alpha", "dola_layers", "low_memory", "num_beam_groups", "diversity_penalty", "constraints",
            "force_words_ids", "custom_generate", "trust_remote_code",
        ),
        _HUB,
    ),
}  # fmt: skip

# Besides None and False, what leaves a refused option off.
_OFF: dict[str, Any] = {"use_cache": True, "guidance_scale": 1, "num_beam_groups": 1, "diversity_penalty": 0}


@dataclass
class Decoding:
    """The settings by which one call of `generate` decodes.

    Attributes:
        config: all options, for a backbone whose own generation config is out of the way (`behind_prefix`).
        arguments: what else `generate` is called with.
        copies: how many sequences each row becomes, for beams or samples.
    """

    config: GenerationConfig
    arguments: dict[str, Any]
    copies: int


def plan_decoding(options: Mapping[str, Any], backbone: Backbone, width: int) -> Decoding:
    """Sort options into those that act and those that cannot, before anything runs.

    Args:
        options: of `generate`, None standing for not given; `generation_config` may hold more of them, which the others
            override.
        backbone: which tokens end a text, and which one pads, is its tokenizer's and its LM's to say.
        width: tokens of the longest instruction.

    Raises:
        UserError: an option that is unknown, cannot act behind a prefilled cache, or has an impossible value.
    """
    given = {**_from_config(options.get("generation_config")), **{k: v for k, v in options.items() if v is not None}}
    given.pop("generation_config", None)
    allowed = (WORKING & _known()) | ARGUMENTS
    for name, value in given.items():
        if name in REFUSED:
            if not _is_off(name, value):
                raise UserError(f"generate: {name} = {_short(value)}: cannot be used, {REFUSED[name]}")
        elif name not in allowed:
            raise UserError(f"generate: unknown option {name!r}; {suggest(name, allowed)}")
    arguments = {k: v for k, v in given.items() if k in ARGUMENTS}
    chosen = {k: v for k, v in given.items() if k in WORKING}
    chosen.setdefault("eos_token_id", end_tokens(backbone.lm, backbone.tokenizer) or None)
    chosen.setdefault("pad_token_id", backbone.pad_id)
    try:
        config = GenerationConfig(use_cache=True, **chosen)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"generate: {' '.join(str(error).split())}") from error
    if "stop_strings" in chosen:
        arguments.setdefault("tokenizer", backbone.tokenizer)
        if not isinstance(arguments["tokenizer"], PreTrainedTokenizerBase):
            raise UserError(
                "generate: stop_strings: cannot be found without the backbone's tokenizer; give tokenizer=..."
            )
    if "streamer" in arguments and (config.num_beams or 1) > 1:
        raise UserError(f"generate: streamer: cannot be used with num_beams = {config.num_beams}, only with 1")
    if config.max_new_tokens is None and config.max_length is not None and config.max_length <= width:
        raise UserError(
            f"generate: max_length = {config.max_length}: the instruction alone has {width} tokens; "
            "give more, or max_new_tokens"
        )
    return Decoding(config, arguments, max(config.num_beams or 1, config.num_return_sequences or 1))


def end_tokens(lm: Any, tokenizer: Any) -> list[int]:
    """The ids that end a text: the tokenizer's eos, and the special tokens among what the model declares.

    The tokenizer's eos is what responses end in when an adapter is trained, so it always counts. Chat models declare
    more: Llama 3 ends a turn with one token and a document with another, Gemma's end of a turn stands in its generation
    config alone. Such a token is part of what the model was taught, as its vocabulary is, and not a preference in
    decoding. But an id may also be the mere default of a config class (2 in Llama's), and in another vocabulary an
    ordinary piece of a word; so it has to be one of the tokens that were added to the tokenizer beside its vocabulary.
    """
    own = tokenizer.eos_token_id
    declared = getattr(lm.generation_config, "eos_token_id", None)
    if declared is None:
        declared = getattr(lm.config.get_text_config(), "eos_token_id", None)
    ids = list(declared) if isinstance(declared, list | tuple) else [] if declared is None else [declared]
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
        ids = [i for i in ids if i in special]
    return list(dict.fromkeys(([] if own is None else [own]) + ids))


@contextmanager
def behind_prefix(lm: Any) -> Iterator[None]:
    """A context in which the backbone's `generate` continues a cache that holds all of the instruction but its last
    token, and knows nothing of the backbone's own generation config."""
    # `generate` fills in from it whatever the config that it is handed leaves open.
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    hook = lm.register_forward_pre_hook(_last_column, with_kwargs=True)
    logger = logging.getLogger("transformers.generation.utils")
    logger.addFilter(_not_of_padding)
    try:
        yield
    finally:
        logger.removeFilter(_not_of_padding)
        hook.remove()
        lm.generation_config = own


def new_tokens(output: Any, width: int) -> Any:
    """What `generate` returned without its first `width` ids; of a ModelOutput its `sequences`.

    A ModelOutput loses its cache, whose columns are not those of any ids.
    """
    if not isinstance(output, dict):
        return output[:, width:]
    kept = {key: value for key, value in output.items() if not isinstance(value, Cache)}
    return type(output)(**{**kept, "sequences": output["sequences"][:, width:]})


def _last_column(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # Where soft tokens stand among the cached columns, ids and mask differ in width, and `generate` takes the ids for
    # the new ones alone.
    last = {name: kwargs[name][..., -1:] for name in ("input_ids", "position_ids") if kwargs.get(name) is not None}
    return args, {**kwargs, **last}


def _not_of_padding(record: logging.LogRecord) -> bool:
    # For the same reason `generate` takes an instruction that ends in the pad token (eos in many chat formats) for one
    # that is padded on the right.
    return "right-padding was detected" not in record.getMessage()


def _from_config(config: Any) -> dict[str, Any]:
    """The options that a generation config gives; what it holds beyond them no decoding reads."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise UserError(f"generate: generation_config = {_short(config)}: has to be a transformers.GenerationConfig")
    return {k: v for k, v in vars(config).items() if k in _known() and v is not None}


@functools.cache
def _known() -> frozenset[str]:
    """The options of the installed release; a generation config takes other names too, and forgets them."""
    return frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_")) - {"transformers_version"}


def _is_off(name: str, value: Any) -> bool:
    if value is None or (name in _OFF and value == _OFF[name]):
        return True
    return value is False and name != "use_cache"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
