"""What generated ids say as text, where the task's own words are special tokens or come back spelled otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iapt.config.errors import UserError
from iapt.data.batch import Encoded


class Speller:
    """Decodes generated ids without the special tokens, but with those that the split's own answers hold.

    Args:
        tokenizer: the backbone's.
        items: the split; its responses and label words say which special tokens are text here. Eos, pad and unk
            never are: they end a row, fill it up, or stand for what the tokenizer does not know.
    """

    def __init__(self, tokenizer: Any, items: Sequence[Encoded]) -> None:
        self.tokenizer = tokenizer
        special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
        never = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        used = {token for item in items for ids in (item.response, *item.choices) for token in ids}
        self._dropped = special - ((special & used) - never)
        self._keeps = self._dropped != special

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids, white space at the ends taken off."""
        if self._keeps:
            rows = [[token for token in row if token not in self._dropped] for row in rows]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=not self._keeps)
        return [text.strip() for text in texts]

    def label_words(self, words: Sequence[str], choices: Sequence[Sequence[int]]) -> list[tuple[str, ...]]:
        """The spellings by which each label word is known in a generated text: its own, and its ids'.

        Raises:
            UserError: a word of which decoding leaves nothing, or two that it makes the same.
        """
        decoded = self.texts(choices)
        for number, (word, text) in enumerate(zip(words, decoded, strict=True)):
            if not text or text in decoded[:number]:
                why = (
                    "nothing is left of it" if not text else f"it reads as {text!r}, as {words[decoded.index(text)]!r}"
                )
                raise UserError(
                    f"task.label_words: {word!r} cannot be told in a generated text, where {why}; "
                    "allowed are other words, or task.scoring=likelihood or constrained"
                )
        return [(word, text) for word, text in zip(words, decoded, strict=True)]
