"""What a training step learns from: global batches, and for bi-level training two kinds of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from iapt.config.errors import UserError
from iapt.data.batch import Encoded, training_batches
from iapt.model.adapted import AdaptedModel


class Batches:
    """A split's global batches: a function of seed and step alone, so that resuming needs no iterator's state."""

    def __init__(self, items: Sequence[Encoded], size: int, seed: int, grouped: bool) -> None:
        self.per_epoch = math.ceil(len(items) / size)
        self._items, self._size, self._seed, self._grouped = items, size, seed, grouped
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __call__(self, step: int) -> list[Encoded]:
        """The batch of optimiser step `step` (from 0)."""
        epoch, position = divmod(step, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, training_batches(self._items, self._size, self._seed, epoch, self._grouped)
        return [self._items[i] for i in self._epoch[1][position]]


@dataclass
class Phase:
    """One part of a step: these parameters learn on these batches while those stay fixed."""

    batches: Batches
    parameters: list[nn.Parameter]
    fixed: list[nn.Parameter]


def phases(
    model: AdaptedModel, train: Sequence[Encoded], dev: Sequence[Encoded], batch_size: int, seed: int, grouped: bool
) -> list[Phase]:
    """The parts of every step: one, or two if the method asks for bi-level training, the train batch's first.

    Raises:
        UserError: if there is too little to hold examples out of.
    """
    named, bilevel = model.trainable(), model.method.bilevel if model.method else None

    def batches(items: Sequence[Encoded]) -> Batches:
        return Batches(items, batch_size, seed, grouped)

    held_out = [p for name, p in named.items() if bilevel and name.startswith(bilevel.prefix)]
    if bilevel is None or not held_out:
        return [Phase(batches(train), list(named.values()), [])]
    others = [p for name, p in named.items() if not name.startswith(bilevel.prefix)]
    rest, share = (train, dev) if bilevel.source == "dev" else hold_out(train, bilevel.share, seed)
    return [Phase(batches(rest), others, held_out), Phase(batches(share), held_out, others)]


def hold_out(items: Sequence[Encoded], share: float, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """Cut a share of the examples off at random: (the rest, the share), neither of them empty.

    Raises:
        UserError: of fewer than two examples.
    """
    if len(items) < 2:
        raise UserError(f"bi-level training holds examples out of train, which has {len(items)}; 2 are needed")
    order = list(range(len(items)))
    random.Random(f"{seed}-held-out").shuffle(order)
    size = min(max(round(share * len(items)), 1), len(items) - 1)
    chosen = set(order[:size])
    return [e for i, e in enumerate(items) if i not in chosen], [e for i, e in enumerate(items) if i in chosen]


def protocol_batch_size(train_size: int) -> int:
    """16 below 10,000 training examples, else 128 (label S)."""
    return 16 if train_size < 10_000 else 128
