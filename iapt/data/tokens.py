"""Texts to token ids, and whose the special tokens are: those that a text writes stay, those that the tokenizer adds
are found by asking it, never by their look.

Tokenizers add a bos (Llama), an eos (T5), a bos that is called eos (OPT), both, or nothing (GPT-2, most chat models).
What follows a text is never added here, because a response follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from iapt.config.errors import UserError

Ids = tuple[int, ...]
# How far back a tokenizer may look when it cuts what follows an instruction. Examples that agree in so many
# last characters share the result, which spares tokenising each instruction once more for every label word.
REACH = 32
_PROBES = ("a", "0")  # texts without special tokens; an odd vocabulary may lack one of them


def opening(tokenizer: Any, texts: Iterable[str] = ()) -> Ids:
    """The ids that the tokenizer puts before every text of its own accord, () if there are none.

    Args:
        texts: asked about if the tokenizer finds no token in the probes, the first with tokens counts.
    """
    for text in itertools.chain(_PROBES, texts):
        plain, whole = (_ids(tokenizer, [text], special)[0] for special in (False, True))
        if plain:
            return whole[: next(i for i, token in enumerate(whole) if token in plain)]
    return ()


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Ids of each text and of the special tokens that it writes, without any that the tokenizer adds."""
    return _ids(tokenizer, texts, False)


def join(start: Ids, ids: Ids) -> Ids:
    """An opening and a text; what the text has already written of the opening's end does not come twice."""
    return start[: len(start) - written(start, ids)] + ids


def written(start: Ids, ids: Ids) -> int:
    """How many ids at the end of an opening the text writes itself, at its beginning."""
    return next((n for n in range(len(start), 0, -1) if start[-n:] == ids[:n]), 0)


def find_tails(
    tokenizer: Any, pairs: Iterable[tuple[str, str]], instructions: dict[str, Ids], separator: str
) -> dict[tuple[str, str], Ids]:
    """The ids that `separator + text` adds to an instruction's.

    Args:
        pairs: (instruction, text).
        instructions: instruction -> its ids, without the opening.
        separator: belongs to the text's ids.

    Returns:
        (the instruction's last REACH characters, text) -> ids. Where the tokenizer merges across the boundary,
        those of `separator + text` by itself.
    """
    first: dict[tuple[str, str], str] = {}
    for instruction, text in pairs:
        first.setdefault((instruction[-REACH:], text), instruction)
    keys = list(first)
    wholes = plain_ids(tokenizer, [first[key] + separator + key[1] for key in keys])
    tails, merged = {}, []
    for key, whole in zip(keys, wholes, strict=True):
        ids = instructions[first[key]]
        tails[key] = whole[len(ids) :]
        if whole[: len(ids)] != ids:
            merged.append(key)
    alone = plain_ids(tokenizer, [separator + text for _, text in merged])
    return tails | dict(zip(merged, alone, strict=True))


def finish_choices(words: tuple[Ids, ...], names: Sequence[str], eos: int | None, longest: int) -> tuple[Ids, ...]:
    """Tell the choices apart: all of them end in eos when one is a prefix of another.

    Args:
        words: the ids of each label word.
        names: the label words.
        longest: how many ids a word may have.

    Raises:
        UserError: words that the tokenizer cannot tell apart, or that are too long.
    """
    pairs = [(i, j) for i in range(len(words)) for j in range(len(words)) if i != j]
    if any(words[j][: len(words[i])] == words[i] for i, j in pairs) and len(set(words)) == len(words):
        if eos is None:
            raise UserError("task.label_words: one is the beginning of another, and the tokenizer has no eos")
        words = tuple(ids if ids[-1:] == (eos,) else (*ids, eos) for ids in words)
    for i, j in pairs:
        if words[i] == words[j]:
            raise UserError(f"task.label_words: '{names[i]}' and '{names[j]}' have the same tokens {words[i]}")
    for ids, name in zip(words, names, strict=True):
        if len(ids) > longest:
            raise UserError(f"trainer.max_response_length = {longest}: the label word '{name}' takes {len(ids)} tokens")
    return words


def _ids(tokenizer: Any, texts: Sequence[str], special: bool) -> list[Ids]:
    if not texts:
        return []
    out = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return [tuple(ids) for ids in out]
