"""How an adapted model answers two-turn questions: the layout of the turns, and their decoding."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Sequence
from typing import Any

import torch

from iapt.benchmarks.judge import Question
from iapt.config.errors import UserError
from iapt.config.task import TaskConfig
from iapt.data.batch import keep_end
from iapt.data.tokens import Ids, join, opening, plain_ids
from iapt.model.adapted import AdaptedModel
from iapt.runs.restore import batch_of, room


class Layout:
    """The layout by which questions become instructions, as the rows that the adapter was trained on did.

    The second turn is two such rows in succession: [first instruction, separator, answer, joiner, second instruction].

    Args:
        task: whose template and separator it is.
        column: of the template that takes a question; None: its only one, or `instruction`.
        joiner: stands between the first turn's answer and the second turn's instruction.

    Raises:
        UserError: a template that no question fits into.
    """

    def __init__(self, task: TaskConfig, column: str | None, joiner: str) -> None:
        self.separator, self.joiner = task.separator, joiner
        columns = _columns(task.template)
        taken = column or (columns[0] if len(columns) == 1 else "instruction")
        if taken not in columns:
            raise UserError(
                f"mt_bench.column = {column or 'null'}: the template of task '{task.name}' has {len(columns)} columns; "
                f"name the one that takes a question: {', '.join(columns) or 'none'}"
            )
        self.column = taken
        # The wording for rows in which another column is empty, as all others are here.
        self.template = next((text for name, text in task.templates_without.items() if name != taken), task.template)
        if taken not in _columns(self.template):
            raise UserError(f"task.templates_without: no question fits into {self.template!r}, it lacks {{{taken}}}")
        self.first("?")  # a format that texts do not fit shows now

    def first(self, question: str) -> str:
        """The first turn's instruction; columns other than the question's are empty."""
        values = dict.fromkeys(_columns(self.template), "") | {self.column: question}
        try:
            return self.template.format(**values)
        except (LookupError, AttributeError, ValueError, TypeError) as error:
            raise UserError(f"task.template = {self.template!r}: no question fits into it: {error!r}") from None

    def second(self, turns: tuple[str, str], answer: str) -> str:
        """The second turn's instruction, the first turn and its answer before it."""
        return self.first(turns[0]) + self.separator + answer + self.joiner + self.first(turns[1])

    def fingerprint(self) -> str:
        """Sixteen hex digits of all that decides the layout."""
        parts = [self.template, self.separator, self.joiner, self.column]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Answerer:
    """Answers batches of questions, both turns.

    Args:
        model: any method, any backbone.
        layout: how the turns become instructions.
        max_new_tokens: maximum tokens of one answer; the rest of the context is available to the prompt.
        seed: of sampling.

    Raises:
        UserError: answers that leave no room for a question.
    """

    def __init__(self, model: AdaptedModel, layout: Layout, max_new_tokens: int, seed: int) -> None:
        self.model, self.layout, self.max_new_tokens, self.seed = model.eval(), layout, max_new_tokens, seed
        space = room(model)
        self.limit = None if space is None else space - max_new_tokens
        self.cut, self.total = 0, 0
        self._opening: Ids | None = None
        if self.limit is not None and self.limit < 2:
            raise UserError(
                f"mt_bench.max_new_tokens = {max_new_tokens}: leaves no room for a question in the {space} tokens that "
                f"backbone '{model.backbone.name}' has; must be well below that"
            )

    def __call__(self, questions: Sequence[Question], temperature: float) -> list[tuple[str, str]]:
        """The two answers to every question; temperature 0 decodes greedily."""
        # By question, so that where an earlier run was interrupted does not decide what is drawn.
        torch.manual_seed(_seed(self.seed, questions[0].id))
        firsts = self._generate([self.layout.first(q.turns[0]) for q in questions], temperature)
        pairs = zip(questions, firsts, strict=True)
        seconds = self._generate([self.layout.second(q.turns, first) for q, first in pairs], temperature)
        return list(zip(firsts, seconds, strict=True))

    def notes(self) -> list[str]:
        """List what the user should be told about instructions that did not fit."""
        if not self.cut:
            return []
        return [f"{self.cut} of {self.total} instructions lost their beginning ({self.limit} tokens are left for them)"]

    def _generate(self, texts: list[str], temperature: float) -> list[str]:
        tokenizer = self.model.backbone.tokenizer
        whole = self._tokens(texts)
        kept = [keep_end(ids, self.limit, tokenizer.bos_token_id) for ids in whole]
        self.total += len(whole)
        self.cut += sum(a != b for a, b in zip(whole, kept, strict=True))
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
        ids = self.model.generate(batch_of(self.model, kept), max_new_tokens=self.max_new_tokens, **sampling)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _tokens(self, texts: list[str]) -> list[Ids]:
        """Ids with what the tokenizer puts before a text, and nothing of its own behind it, as in training."""
        tokenizer = self.model.backbone.tokenizer
        if self._opening is None:
            self._opening = opening(tokenizer, texts)
        whole = [join(self._opening, plain) for plain in plain_ids(tokenizer, texts)]
        for text, ids in zip(texts, whole, strict=True):
            if len(ids) < 2:
                raise UserError(f"mt_bench: an instruction needs at least 2 tokens, {text!r} has {len(ids)}")
        return whole


def _columns(template: str) -> list[str]:
    return sorted({name for _, name, _, _ in string.Formatter().parse(template) if name is not None})


def _seed(seed: int, key: Any) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}-{key}".encode()).digest()[:4], "big")
