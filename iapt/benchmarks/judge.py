"""An LLM as a judge: single-answer grading of two-turn answers behind an OpenAI-compatible endpoint.

What counts as a grade is a judge's reply with one rating from 1 to 10 in double brackets. Anything else (no reply, a
server's error, a reply without a rating or with two) is tried again with growing pauses, and in the end counted as
failed; no rating is ever made up for it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from iapt.config.errors import TrainingError, UserError
from iapt.config.fields import at_least
from iapt.folder.files import append_row, read_rows

log = logging.getLogger(__name__)

Ask = Callable[[str], str]  # a prompt -> the judge's reply; RefusedError if there is none

LONGEST_PAUSE = 60.0  # seconds
HOPELESS = (400, 413, 422)  # no further attempt changes these (a prompt too long for the judge); others may succeed
FINAL = (401, 403, 404, 405)  # key, model or address are wrong: the same for every request
PROMPT = "iapt-single-v1"  # the name of the wording below, kept with every judgment

SYSTEM = "You grade the answers of an AI assistant. You are strict, fair, and not impressed by length."
ORDER = (
    "Say in a few sentences what is good and what is wrong about it: is it correct, does it do what was asked, is it "
    "useful, deep enough, and clear? Then give a rating from 1 (useless) to 10 (could not be better) in double "
    "square brackets on a line of its own, like this: Rating: [[5]]"
)
FIRST = "{reference}[Question]\n{question}\n\n[Answer of the assistant]\n{answer}\n[End of the answer]\n\n"
SECOND = (
    "{reference}[Conversation]\nUser: {first}\n\nAssistant: {first_answer}\n\nUser: {question}\n\n"
    "Assistant: {answer}\n[End of the conversation]\n\n"
)


@dataclass
class JudgeConfig:
    """The endpoint and its patience; null `base_url` for no judge."""

    base_url: str | None = None  # .../v1; requests go to base_url/chat/completions
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable with the key; unset: none is sent
    references: str | None = None  # answers (FastChat's format) shown to the judge beside the assistant's
    max_tokens: int = at_least(2048, 1)
    retries: int = at_least(5, 0)  # attempts after the first
    backoff: float = at_least(1.0, 0)  # seconds before the first retry, doubled each time
    timeout: float = at_least(120.0, 0.01)  # seconds
    workers: int = at_least(4, 1)  # requests at a time


@dataclass(frozen=True)
class Question:
    """One question of two turns."""

    id: Any
    category: str
    turns: tuple[str, str]


class RefusedError(Exception):
    """A request that failed; `hopeless` if no further attempt can do better, `final` if no other request can either."""

    def __init__(self, reason: str, *, hopeless: bool = False, final: bool = False, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.hopeless, self.final, self.pause = hopeless, final, pause


def problems(config: JudgeConfig) -> list[str]:
    """List what is wrong with the settings, one line each."""
    if not config.base_url:
        given = [k for k in ("model", "references") if getattr(config, k)]
        return [f"mt_bench.judge.{k}: does nothing without mt_bench.judge.base_url" for k in given]
    found = []
    if not re.match(r"https?://[^/]", config.base_url):
        found.append(f"mt_bench.judge.base_url = {config.base_url!r}: expected http://... or https://...")
    if importlib.util.find_spec("openai") is None or importlib.util.find_spec("tenacity") is None:
        found.append("mt_bench.judge.base_url: needs a client for the endpoint: pip install 'iapt[judge]'")
    if not config.model:
        found.append("mt_bench.judge.model: missing; the name that the endpoint knows the judge by")
    return found


def read_references(path: str | None) -> dict[Any, list[str]]:
    """Reference answers, question id -> both turns; {} for no path.

    Raises:
        UserError: a file that cannot be read or is no answer file.
    """
    if path is None:
        return {}
    where, file = f"mt_bench.judge.references = {path!r}", Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{where}: no such file")
    found = {}
    for number, row in enumerate(read_rows(file, whole=True), 1):
        try:
            turns = [str(turn) for turn in row["choices"][0]["turns"]]
            found[row["question_id"]] = turns
        except (LookupError, TypeError):
            turns = []
        if len(turns) != 2:
            raise UserError(f"{where}: row {number} needs question_id and choices [{{turns: [first, second]}}]")
    return found


def prompt(question: Question, answers: Sequence[str], reference: Sequence[str], turn: int) -> str:
    """Return the messages that ask the judge about turn 1 or 2; `reference` is [] or both turns' reference answers."""
    shown = [f"[Reference answer, turn {i}]\n{text}\n\n" for i, text in enumerate(reference[:turn], 1)]
    compare = "Compare it with the reference answer and name its mistakes first. " if shown else ""
    if turn == 1:
        text = FIRST.format(reference="".join(shown), question=question.turns[0], answer=answers[0])
        return f"{text}Grade this answer. {compare}{ORDER}"
    text = SECOND.format(
        reference="".join(shown), first=question.turns[0], first_answer=answers[0], question=question.turns[1],
        answer=answers[1],
    )  # fmt: skip
    return f"{text}Grade the assistant's second answer alone; the first is there for context. {compare}{ORDER}"


def rating(reply: str) -> float:
    """The rating in a judge's reply.

    Raises:
        RefusedError: none, several that differ, or one outside 1 to 10.
    """
    found = {float(text) for text in re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]", reply)}
    if len(found) != 1:
        raise RefusedError(f"the reply has {len(found)} ratings [[n]]: {reply[-80:]!r}")
    value = found.pop()
    if not 1 <= value <= 10:
        raise RefusedError(f"the rating {value:g} is outside 1 to 10")
    return value


def grade(
    questions: Sequence[Question],
    answers: dict[Any, list[str]],
    references: dict[Any, list[str]],
    config: JudgeConfig,
    model_id: str,
    path: Path,
) -> list[dict[str, Any]]:
    """Have both turns of every answer graded, but for those that this judge has graded in `path`.

    Args:
        answers: question id -> both turns' answers.
        references: question id -> both turns' reference answers, where there are any.
        path: judgments are added to it one by one.

    Returns:
        What failed: question_id, turn, reason.

    Raises:
        UserError: the endpoint refuses key, model or request for good; what was graded until then is kept.
    """
    ask = _client(config)
    done = {(row["question_id"], row["turn"]) for row in read_rows(path) if row["judge"][0] == config.model}
    todo = [(q, turn) for q in questions for turn in (1, 2) if (q.id, turn) not in done]
    failures, refused, stop = [], None, threading.Event()
    with ThreadPoolExecutor(config.workers) as pool:
        asked = {}
        for question, turn in todo:
            text = prompt(question, answers[question.id], references.get(question.id, []), turn)
            asked[pool.submit(_ask_again, text, config, ask, stop)] = (question, turn, text)
        try:
            for number, future in enumerate(as_completed(asked), 1):
                question, turn, text = asked[future]
                try:
                    reply, score = future.result()
                except RefusedError as error:
                    # Others may be graded already, so the end waits for their turn.
                    refused = error if error.final else refused
                    failures.append({"question_id": question.id, "turn": turn, "reason": str(error)})
                    continue
                row = {
                    "question_id": question.id, "model": model_id, "judge": [config.model, PROMPT],
                    "user_prompt": text, "judgment": reply, "score": score, "turn": turn, "tstamp": time.time(),
                }  # fmt: skip
                append_row(path, row)
                if number % 20 == 0 or number == len(todo):
                    log.info("judge: %d of %d, %d failed", number, len(todo), len(failures))
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    if refused:
        raise UserError(f"mt_bench.judge.base_url = {config.base_url}: {refused}")
    order = {q.id: index for index, q in enumerate(questions)}
    return sorted(failures, key=lambda f: (order[f["question_id"]], f["turn"]))


def summarise(
    questions: Sequence[Question], rows: Sequence[dict[str, Any]], judge: str | None, failures: list[dict[str, Any]]
) -> dict[str, Any]:
    """One judge's grades: mean ratings (1 to 10) over all judgments, by turn and by category, and their number.

    `mean` is None where nothing was graded. A failed judgment is in no mean.
    """
    categories = {q.id: q.category for q in questions}
    kept = [row for row in rows if row["judge"][0] == judge and row["question_id"] in categories]
    by_turn, by_category = defaultdict(list), defaultdict(list)
    for row in kept:
        by_turn[str(row["turn"])].append(row["score"])
        by_category[categories[row["question_id"]]].append(row["score"])
    return {
        "judge": judge,
        "prompt": PROMPT,
        "mean": fmean(row["score"] for row in kept) if kept else None,
        "turns": {turn: fmean(scores) for turn, scores in sorted(by_turn.items())},
        "categories": {
            name: fmean(by_category[name]) for name in dict.fromkeys(categories.values()) if name in by_category
        },
        "n_judged": len(kept),
        "n_failed": len(failures),
        "failures": failures,
    }


def refuse_nothing(grades: dict[str, Any]) -> None:
    """Raises TrainingError if no judgment succeeded: there is no result then."""
    if grades["mean"] is None:
        raise TrainingError(f"mt_bench: all {grades['n_failed']} judgments failed: {grades['failures'][0]['reason']}")


def _ask_again(text: str, config: JudgeConfig, ask: Ask, stop: threading.Event) -> tuple[str, float]:
    """The judge's reply and its rating, after as many attempts as that takes; none once `stop` is set.

    Raises:
        RefusedError: the last attempt's.
    """
    import tenacity

    def once() -> tuple[str, float]:
        reply = ask(text)
        return reply, rating(reply)

    def pause(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, RefusedError)
        return min(max(config.backoff * 2 ** (state.attempt_number - 1), error.pause), LONGEST_PAUSE)

    if stop.is_set():
        raise RefusedError("not asked")
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, RefusedError) and not error.hopeless),
        stop=tenacity.stop_any(tenacity.stop_after_attempt(config.retries + 1), tenacity.stop_when_event_set(stop)),
        wait=pause,
        sleep=tenacity.sleep_using_event(stop),
        reraise=True,
    )
    try:
        return attempts(once)
    except RefusedError as error:
        if error.final:
            stop.set()
        raise


def _client(config: JudgeConfig) -> Ask:
    """One request to the endpoint; the answer raises RefusedError for everything but a text."""
    import openai

    key = os.environ.get(config.api_key_env)
    # Retries are ours, because they also heed the rating in a reply.
    client = openai.OpenAI(base_url=config.base_url, api_key=key or "none", timeout=config.timeout, max_retries=0)

    def ask(text: str) -> str:
        try:
            completion = client.chat.completions.create(
                model=config.model or "",
                messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
                temperature=0,
                max_tokens=config.max_tokens,
                extra_headers={} if key else {"Authorization": openai.Omit()},
            )
            reply = completion.choices[0].message.content
        except openai.APIStatusError as error:
            code, pause = error.status_code, error.response.headers.get("Retry-After", "")
            hint = "" if key or code not in (401, 403) else f" (no key in {config.api_key_env})"
            raise RefusedError(
                f"HTTP {code}{hint}: {' '.join(error.response.text[:300].split())}",
                hopeless=code in HOPELESS or code in FINAL,
                final=code in FINAL,
                pause=float(pause) if pause.isdigit() else 0.0,
            ) from None
        except openai.APITimeoutError:
            raise RefusedError("no reply: timed out") from None
        except openai.APIConnectionError as error:
            raise RefusedError(f"no reply: {error.__cause__ or error}") from None
        except (openai.OpenAIError, AttributeError, ValueError, LookupError, TypeError) as error:
            raise RefusedError(f"a reply that is no chat completion: {error!r}") from None
        if not isinstance(reply, str):
            raise RefusedError("a reply without a text")
        return reply

    return ask
