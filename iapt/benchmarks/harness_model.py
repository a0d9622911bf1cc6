"""AdaptedModel behind lm-evaluation-harness's `LM` interface. Importing this needs the extra `iapt[harness]`.

The harness's context is the instruction, its continuation the response: soft tokens read the context alone. Where
one ends and the other begins is tokenised by the harness's own rule (`TemplateLM._encode_pair`). With zero_shot the
numbers are those of the harness's `hf` model, except where a context is too long: a leading bos is kept here, as in
training, and every option of one question loses equally much.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from iapt.config.errors import UserError
from iapt.data.batch import keep_end
from iapt.data.tokens import Ids, join, opening, plain_ids
from iapt.model.adapted import AdaptedModel
from iapt.runs.restore import batch_of, room

DEFAULT_NEW_TOKENS = 256  # the harness's own, where a task does not say
Request = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]


class AdaptedLM(TemplateLM):  # type: ignore[misc]
    """An adapted model as the harness wants one.

    Args:
        model: any method, any backbone.
        batch_size: contexts that are run together.
        max_length: tokens of context and continuation; None, or more than the backbone has: what it has.

    Attributes:
        cut: how many contexts lost their beginning, by kind of request.
    """

    def __init__(self, model: AdaptedModel, batch_size: int, max_length: int | None = None) -> None:
        super().__init__()
        self.model = model.eval()
        self.tokenizer = model.backbone.tokenizer
        self.batch_size = batch_size
        self.max_length = min((n for n in (max_length, room(model)) if n is not None), default=None)
        self.cut: Counter[str] = Counter()
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"harness: the tokenizer of backbone '{model.backbone.name}' has no eos token")
        self._opening = opening(self.tokenizer)
        self._device = model.lm.device

    def notes(self) -> list[str]:
        """List what the user should be told about contexts that did not fit."""
        return [
            f"{count} contexts of {kind} requests lost their beginning ({self.max_length} tokens fit)"
            for kind, count in self.cut.items()
        ]

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's eos."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands in for an empty context: bos, or eos where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids behind what the tokenizer puts before every text, as in training; nothing is added at the end."""
        [ids] = plain_ids(self.tokenizer, [string])
        return list(ids if add_special_tokens is False else join(self._opening, ids))

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would say it) of every continuation.

        Requests with the same context share its encoding.

        Raises:
            UserError: a continuation that is empty once tokenised, or leaves no room for any context.
        """
        groups: dict[Ids, list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise UserError(f"harness: a continuation is empty once tokenised: {requests[number][0]}")
            groups[tuple(context)].append(number)
        found: dict[int, tuple[float, bool]] = {}
        # The longest first: what does not fit in memory fails at once. One token is no instruction to encode.
        order = sorted(groups, key=len, reverse=True)
        long, single = [c for c in order if len(c) > 1], [c for c in order if len(c) == 1]
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="harness: log-likelihoods") as bar:
            for chunk in _chunks(long, self.batch_size):
                conts = [[tuple(requests[n][2]) for n in groups[context]] for context in chunk]
                kept = [self._keep(c, max(map(len, own)) - 1) for c, own in zip(chunk, conts, strict=True)]
                prefix = self.model.prefill(batch_of(self.model, kept))
                for column in range(max(map(len, conts))):
                    # Rows with fewer continuations repeat their last one.
                    ids, mask = _right_padded([own[min(column, len(own) - 1)] for own in conts], self._device)
                    rows = _score(self.model.engine.extend(prefix, ids, mask), ids, mask)
                    for context, row in zip(chunk, rows, strict=True):
                        if column < len(groups[context]):
                            found[groups[context][column]] = row
                bar.update(sum(map(len, conts)))
            pairs = [(context, n) for context in single for n in groups[context]]
            for _, n in pairs:
                if self.max_length is not None and len(requests[n][2]) > self.max_length:
                    raise UserError(_no_room(len(requests[n][2]), self.max_length))
            for part in _chunks(pairs, self.batch_size):
                batch = batch_of(self.model, [c for c, _ in part], [tuple(requests[n][2]) for _, n in part])
                logits = self.model.engine.response_logits(batch)
                found |= zip((n for _, n in part), _score(logits, batch.response_ids, batch.response_mask), strict=True)
                bar.update(len(part))
        answers = [found[number] for number in range(len(requests))]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood, in nats, of whole texts, in windows of the context's length, as the harness cuts them."""
        limit = self.max_length or 2**31
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, limit, context_len=1)
            pairs: list[Request] = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Decode every context until one of its stop strings, eos, or `max_gen_toks` tokens.

        Raises:
            UserError: more new tokens than the context has room for.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append(number)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="harness: generation") as bar:
            for numbers in groups.values():
                encoded = {n: tuple(self.tok_encode(requests[n].args[0])) or (self.prefix_token_id,) for n in numbers}
                for chunk in _chunks(sorted(numbers, key=lambda n: -len(encoded[n])), self.batch_size):
                    options = requests[chunk[0]].args[1]
                    for n, text in zip(chunk, self._generate([encoded[n] for n in chunk], options), strict=True):
                        texts[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    bar.update(len(chunk))
        return [texts[number] for number in range(len(requests))]

    def _generate(self, contexts: list[Ids], options: dict[str, Any]) -> list[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
        eos = self.tokenizer.decode([self.eot_token_id])
        stops = [s for s in handle_stop_sequences(settings.pop("until", None), eos) if s]
        new_tokens = int(settings.pop("max_gen_toks"))
        settings.pop("max_length", None)
        if not settings.get("do_sample"):  # transformers warns of what greedy decoding does not read
            settings = {k: v for k, v in settings.items() if k not in ("temperature", "top_p", "top_k")}
        if self.max_length is not None and self.max_length - new_tokens < 2:
            raise UserError(
                f"harness: {new_tokens} new tokens leave no room for a context in {self.max_length}; lower them with "
                "harness.gen_kwargs={max_gen_toks: N}"
            )
        kept = [self._keep(ids, new_tokens, "generation") for ids in contexts]
        # A context of one token would be no instruction: it has a prefix put before it.
        batch = batch_of(self.model, [ids if len(ids) > 1 else (self.prefix_token_id, *ids) for ids in kept])
        stopping = StoppingCriteriaList([_StopStrings(self.tokenizer, stops)])
        ids = self.model.generate(batch, max_new_tokens=new_tokens, stopping_criteria=stopping, **settings)
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [postprocess_generated_text(text, stops, None) for text in decoded]

    def _keep(self, context: Ids, following: int, kind: str = "likelihood") -> Ids:
        """Truncate a context to leave room for `following` tokens."""
        if self.max_length is None:
            return context
        limit = self.max_length - following
        if limit < 2:
            raise UserError(_no_room(following + 1, self.max_length))
        self.cut[kind] += len(context) > limit
        self.cut = +self.cut  # without zeros
        return keep_end(context, limit, self.tokenizer.bos_token_id)


class _StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its new text contains a stop string.

    transformers' own `stop_strings` also looks at what stands before the new tokens.
    """

    def __init__(self, tokenizer: Any, stops: list[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        # A token may be one byte of a character.
        self.reach = max((len(stop.encode()) for stop in stops), default=0) + 1
        self.start: int | None = None
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.start is None or self.done is None:
            self.start = input_ids.shape[1] - 1
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        new = input_ids[:, max(self.start, input_ids.shape[1] - self.reach) :]
        tails = self.tokenizer.batch_decode(new)
        found = [any(stop in tail for stop in self.stops) for tail in tails]
        self.done = self.done | torch.tensor(found, device=input_ids.device)
        return self.done


def _no_room(length: int, limit: int) -> str:
    return f"harness: a continuation of {length} tokens leaves no room for its context in {limit}"


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _right_padded(rows: list[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) int64 ids and their bool mask."""
    width = max(map(len, rows))
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def _score(logits: Tensor, ids: Tensor, mask: Tensor) -> list[tuple[float, bool]]:
    """Logits (B, T, V) that predict ids (B, T) -> the rows' log-likelihoods and whether they are the argmax."""
    chosen = logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    greedy = ((logits.argmax(-1) == ids) | ~mask).all(-1)
    return list(zip((chosen * mask).sum(-1).tolist(), greedy.tolist(), strict=True))
