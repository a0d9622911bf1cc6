"""Token strings as a tree, for decoding that can only end in one of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from iapt.data.batch import Batch
from iapt.data.tokens import Ids


class Trie:
    """Which token may follow a beginning, and which string was followed to its end.

    Every string ends in the stop token, so one may be the beginning of another.

    Args:
        strings: token ids, different from each other; a stop token at their end may be there or not.
        stop: the stop token.

    Attributes:
        depth: the length of the longest string, its stop token included.
    """

    def __init__(self, strings: Iterable[Ids], stop: int) -> None:
        self.stop, self.depth = stop, 0
        self._root: dict[int, Any] = {}
        for index, string in enumerate(strings):
            ids = string[:-1] if string[-1:] == (stop,) else string
            node = self._root
            for token in ids:
                node = node.setdefault(token, {})
            node[stop] = index
            self.depth = max(self.depth, len(ids) + 1)

    def following(self, ids: Sequence[int]) -> list[int]:
        """The tokens that may come after `ids`; the stop token alone behind a string's end, and off the tree."""
        node: Any = self._root
        for token in ids:
            node = node.get(token) if isinstance(node, dict) else None
        return list(node) if isinstance(node, dict) else [self.stop]

    def find(self, ids: Sequence[int]) -> int:
        """The string that `ids` begins with, stop token included. Raises ValueError if it is none."""
        node: Any = self._root
        for token in ids:
            node = node.get(token) if isinstance(node, dict) else node
        if not isinstance(node, int):
            raise ValueError(f"{tuple(ids)} is none of the strings")
        return node


def tries(batch: Batch, stop: int, counts: Sequence[int | None]) -> list[Trie]:
    """The first so many choices of each row, None for all of them, as a tree."""
    assert batch.choice_ids is not None
    assert batch.choice_mask is not None
    lengths = batch.choice_mask.sum(-1).tolist()
    return [
        Trie([tuple(ids[:length]) for ids, length in zip(strings, own, strict=True)][:count], stop)
        for strings, own, count in zip(batch.choice_ids.tolist(), lengths, counts, strict=True)
    ]
