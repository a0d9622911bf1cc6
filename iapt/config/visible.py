"""Text that came from elsewhere (data, adapters, names), made fit for a terminal and for a spreadsheet."""

from __future__ import annotations

import re
import unicodedata

# What a spreadsheet takes for a formula begins like this; a signed number does too, and is none.
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]\d[\d.,]*(e[+-]\d+)?%?( [^=|!]*)?")


def visible(text: str) -> str:
    """Return `text` with its control characters written out (`\\x1b`), so that none of them steers a terminal.

    Line feeds and tabs stay. Characters that turn the direction of writing count as control characters: they show
    another text than the one that is there.
    """
    return "".join(c if _harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _harmless(character: str) -> bool:
    turns = unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return character in "\n\t" or not (turns or unicodedata.category(character) == "Cc")


def csv_field(value: object) -> object:
    """Return a field for a CSV file, its control characters written out, an apostrophe before a formula."""
    if not isinstance(value, str):
        return value
    return f"'{visible(value)}" if _FORMULA.match(value) and not _NUMBER.fullmatch(value) else visible(value)
