"""The two ways a run ends early: the user asked for something impossible, or training itself failed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from iapt.config.visible import visible


class SaidError(Exception):
    """What is printed of an error holds no control characters, whatever the data or the folder it speaks of held."""

    def __str__(self) -> str:
        return visible(super().__str__())


class UserError(SaidError):
    """Bad input. The command line prints the message without a traceback and exits with code 2."""

    exit_code = 2


class ConfigError(UserError):
    """Every problem found in one configuration, so that one edit can repair them all."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(f"{head} in the configuration\n" + "\n".join(f"  {p}" for p in self.problems))


class TrainingError(SaidError):
    """Training started and could not finish (for example a loss that is not a number). Exit code 1."""

    exit_code = 1


def suggest(word: str, known: Iterable[str]) -> str:
    """List what exists, and the nearest of it to `word`: the end of every 'unknown X' message."""
    known = sorted(known)
    hint = nearest(word, known)
    return f"{hint and hint + ' '}known: {', '.join(known) if known else 'none'}"


def nearest(word: str, known: Iterable[str]) -> str:
    """The nearest known word as a question, empty for none; by itself where there are too many words to list."""
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else ""
