"""Examples -> token ids -> batches: tokenise, truncate with a word about it, pad, group by length.

A batch is an instruction and a response: instructions end in one column (left-padded), responses start in one
(right-padded), so that nothing downstream ever searches for the boundary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iapt.config.errors import UserError
from iapt.data.task import Example
from iapt.data.tokens import REACH, Ids, find_tails, finish_choices, join, opening, plain_ids, written

WINDOW = 16  # batches that are sorted by length together: little padding left, still well shuffled


@dataclass(frozen=True)
class Encoded:
    """One example as token ids, without padding."""

    index: int  # position in the split
    instruction: Ids
    response: Ids
    choices: tuple[Ids, ...]  # one per label word, () for generation
    label: int | None = None  # index of the right label


@dataclass
class Batch:
    """B examples. Masks are True at tokens, False at padding."""

    instruction_ids: Tensor  # (B, N) int64, left-padded
    instruction_mask: Tensor  # (B, N) bool
    response_ids: Tensor  # (B, R) int64, right-padded
    response_mask: Tensor  # (B, R) bool
    choice_ids: Tensor | None  # (B, C, T) int64, right-padded
    choice_mask: Tensor | None  # (B, C, T) bool
    indices: Tensor  # (B,) int64, positions in the split
    labels: Tensor | None = None  # (B,) int64, the right labels; None unless all are known

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {k: None if v is None else v.to(device) for k, v in vars(self).items()}
        return Batch(**moved)

    def __len__(self) -> int:
        return len(self.indices)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    choices: Sequence[str],
    separator: str,
    max_length: int,
    max_response_length: int,
    context: int | None,
    add_eos: bool = True,
    room: int = 0,
    max_new_tokens: int = 0,
) -> tuple[list[Encoded], list[str]]:
    """Tokenise a split.

    Response ids are what `instruction + separator + response` adds to the instruction's ids, so that training
    sees the tokens that a tokenizer would produce for the whole text. Where it merges across the boundary,
    `separator + response` is tokenised by itself. Choices follow the same rule, without eos unless one choice
    is a prefix of another (then the shorter one must say that it ends).

    Special tokens that a text writes stay where they are. The tokenizer's own open the instruction, once even if it
    writes them itself, and what it would put at the end of a text is left out; a response ends in one eos.

    Args:
        tokenizer: a transformers tokenizer.
        choices: the label words, [] for generation.
        max_length: instruction tokens kept. Longer instructions lose their beginning, never a leading bos.
        max_response_length: response tokens kept, eos included. Longer ones lose their end.
        context: positions of the backbone, None for no limit. What the longest response (or choice, or
            `max_new_tokens`) of the whole split and `room` leave of it limits every instruction alike: a
            limit by each example's own response would show the instruction something of the label.
        add_eos: end responses with the tokenizer's eos.
        room: positions to keep free for soft tokens.
        max_new_tokens: tokens that generation may add; above 0, no separator or label word may hold an eos that
            ends decoding too early.

    Returns:
        the encoded examples in order, and notes about what was cut and which special tokens were met.

    Raises:
        UserError: an instruction of fewer than 2 tokens, a response or label word of none, label words that
            the tokenizer cannot tell apart, an eos before what is to be decoded, a context with no room.
    """
    eos = tokenizer.eos_token_id
    texts = list(dict.fromkeys(example.instruction for example in examples))
    plain = dict(zip(texts, plain_ids(tokenizer, texts), strict=True))
    start = opening(tokenizer, texts)
    pairs = ((example.instruction, text) for example in examples for text in (*choices, example.response))
    tails = find_tails(tokenizer, pairs, plain, separator)
    finished: dict[tuple[Ids, ...], tuple[Ids, ...]] = {}
    encoded = []
    for index, example in enumerate(examples):
        instruction = join(start, plain[example.instruction])
        if len(instruction) < 2:
            raise UserError(f"{_name(index, example)}: an instruction needs at least 2 tokens")
        end = example.instruction[-REACH:]
        for text in (*choices, example.response):
            if not tails[end, text]:
                raise UserError(f"{_name(index, example)}: response {text!r} is empty once tokenised")
        words = tuple(tails[end, text] for text in choices)
        if words not in finished:
            finished[words] = finish_choices(words, choices, eos, max_response_length)
            if max_new_tokens:
                _refuse_early_eos(tokenizer, separator, finished[words], choices)
        response = tails[end, example.response]
        if add_eos and eos is not None and response[-1] != eos:
            response += (eos,)
        encoded.append(Encoded(index, instruction, response, finished[words], example.label))
    if max_new_tokens and not choices:
        _refuse_early_eos(tokenizer, separator, (), ())
    notes = []
    doubled = sum(written(start, plain[example.instruction]) > 0 for example in examples)
    if doubled:
        notes.append(
            f"{doubled} of {len(examples)} instructions write {tokenizer.decode(list(start))!r}, which the tokenizer "
            "adds by itself: it stands there once"
        )
    early = sum(eos in e.response[:-1] for e in encoded)
    if early:
        notes.append(
            f"{early} of {len(examples)} responses hold {tokenizer.eos_token!r} before their end, where decoding stops"
        )
    kept, cut = _truncate(encoded, tokenizer, max_length, max_response_length, context, room, max_new_tokens)
    return kept, notes + cut


def _refuse_early_eos(tokenizer: Any, separator: str, words: tuple[Ids, ...], names: Sequence[str]) -> None:
    """Raises UserError where decoding would stop before it has said anything, or before the end of a label word."""
    eos, spelled = tokenizer.eos_token_id, tokenizer.eos_token
    if eos is not None and eos in plain_ids(tokenizer, [separator])[0]:
        raise UserError(
            f"task.separator = {separator!r}: belongs to the response, and decoding stops at its {spelled!r}; write it "
            "at the end of task.template"
        )
    for ids, name in zip(words, names, strict=True):
        if eos in ids[:-1]:
            raise UserError(f"task.label_words: decoding stops at {spelled!r}, before the end of {name!r}")


def _name(index: int, example: Example) -> str:
    return f"example {index} ({example.instruction[:60]!r})"


def _truncate(
    encoded: list[Encoded],
    tokenizer: Any,
    max_length: int,
    max_response_length: int,
    context: int | None,
    room: int,
    max_new_tokens: int,
) -> tuple[list[Encoded], list[str]]:
    notes = []
    cut = sum(len(e.response) > max_response_length for e in encoded)
    if cut:
        notes.append(f"{cut} of {len(encoded)} responses lost their end (max_response_length={max_response_length})")
    limit, why = max_length, f"max_length={max_length}"
    if context is not None:
        responses = [min(len(e.response), max_response_length) for e in encoded]
        longest = max([max_new_tokens, *responses, *(len(ids) for e in encoded for ids in e.choices)])
        left = context - room - longest
        if left < 2:
            raise UserError(
                f"a context of {context} tokens has no room for an instruction beside {room} soft tokens and "
                f"responses of {longest}; lower trainer.max_response_length or task.max_new_tokens"
            )
        if left < limit:
            limit, why = left, f"{left} of the context's {context} tokens are left for them"
    kept = [
        replace(
            e,
            instruction=keep_end(e.instruction, limit, tokenizer.bos_token_id),
            response=e.response[:max_response_length],
        )
        for e in encoded
    ]
    cut = sum(len(e.instruction) > limit for e in encoded)
    if cut:
        notes.append(f"{cut} of {len(encoded)} instructions lost their beginning ({why})")
    return kept, notes


def keep_end(ids: Ids, limit: int | None, bos: int | None) -> Ids:
    """The last `limit` ids, all of them without a limit; a leading bos stays."""
    if limit is None or len(ids) <= limit:
        return ids
    head = ids[:1] if ids[0] == bos and limit > 1 else ()
    return head + ids[len(ids) - (limit - len(head)) :]


def collate(items: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad B >= 1 encoded examples to one batch; all have the same number of choices."""
    instruction_ids, instruction_mask = _pad([e.instruction for e in items], pad_id, left=True)
    response_ids, response_mask = _pad([e.response for e in items], pad_id)
    choice_ids = choice_mask = None
    if items[0].choices:
        shape = (len(items), len(items[0].choices), -1)
        ids, mask = _pad([choice for e in items for choice in e.choices], pad_id)
        choice_ids, choice_mask = ids.view(shape), mask.view(shape)
    indices = torch.tensor([e.index for e in items])
    known = [e.label for e in items if e.label is not None]
    labels = torch.tensor(known) if len(known) == len(items) else None
    return Batch(
        instruction_ids, instruction_mask, response_ids, response_mask, choice_ids, choice_mask, indices, labels
    )


def _pad(rows: list[Ids], pad_id: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """(len(rows), longest) int64 ids and their bool mask."""
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    ids = [(pad_id,) * g + row if left else row + (pad_id,) * g for row, g in zip(rows, gaps, strict=True)]
    column = torch.arange(width)
    gap = torch.tensor(gaps)[:, None]
    return torch.tensor(ids), column >= gap if left else column < width - gap


def evaluation_batches(items: Sequence[Encoded], batch_size: int) -> list[list[int]]:
    """Positions in batches of like length, longest first (what does not fit in memory fails at once)."""
    order = sorted(range(len(items)), key=lambda i: (-_length(items[i]), i))
    return _cut(order, batch_size)


def training_batches(
    items: Sequence[Encoded], batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> list[list[int]]:
    """Positions of one epoch in global batches, the same on every process.

    Each position occurs once; the last batch is short when `batch_size` does not divide their number. With
    `group_by_length` batches hold examples of like length: shuffled examples are sorted within windows of
    16 batches, then the full batches are shuffled.
    """
    rng = random.Random(f"{seed}-{epoch}")
    order = list(range(len(items)))
    rng.shuffle(order)
    if not group_by_length:
        return _cut(order, batch_size)
    windows = _cut(order, batch_size * WINDOW)
    windows = [sorted(window, key=lambda i: _length(items[i])) for window in windows]
    batches = [batch for window in windows for batch in _cut(window, batch_size)]
    short = [b for b in batches if len(b) < batch_size]
    batches = [b for b in batches if len(b) == batch_size]
    rng.shuffle(batches)
    return batches + short


def _length(item: Encoded) -> int:
    return len(item.instruction) + len(item.response)


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]
