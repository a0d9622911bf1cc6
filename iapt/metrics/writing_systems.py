"""Which metrics read which scripts: a word where the references are written in one that a metric cannot split."""

from __future__ import annotations

import re
from collections.abc import Sequence

ENOUGH = 0.05  # this share of the letters is worth a word; the accents of German or French text are fewer
_HAN = r"\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = r"\u3040-\u30ff\u31f0-\u31ff"
# Thai, Lao, Tibetan, Burmese, Khmer
_SOUTH_EAST = r"\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
_LETTER = re.compile(rf"[^\W_]|[{_SOUTH_EAST}]")  # their vowel signs are no letters to Unicode
_UNSEGMENTED = re.compile(f"[{_HAN}{_KANA}{_SOUTH_EAST}]")
_LATIN = re.compile(r"[a-z0-9]", re.IGNORECASE | re.ASCII)
# What remains without blanks between words after a tokenizer of sacrebleu.
_LEFT = {
    "zh": re.compile(f"[{_KANA}{_SOUTH_EAST}]"),
    "ja-mecab": re.compile(f"[{_SOUTH_EAST}]"),
    "char": re.compile(r"(?!)"),
}
_SPLITS_AT_BLANKS = ("meteor", "qa_f1_em")  # whatever the setting


def notes(names: Sequence[str], tokenizer: str, references: Sequence[str]) -> list[str]:
    """A line for each metric that takes whole sentences for one word, or their letters for blanks.

    Args:
        names: of metrics.
        tokenizer: `task.metric_tokenizer`.
        references: texts that predictions will be compared with.
    """
    letters = "".join(_LETTER.findall("".join(references)))
    if not letters:
        return []

    def share(pattern: re.Pattern[str]) -> float:
        return len(pattern.findall(letters)) / len(letters)

    whole, others = share(_UNSEGMENTED), 1 - share(_LATIN)
    remedy = "intl" if whole < ENOUGH else "char" if share(_LEFT["zh"]) >= ENOUGH else "zh"
    found = []
    for name in names:
        own = name in ("bleu", "rouge_l")
        if name == "rouge_l" and tokenizer == "default" and others >= ENOUGH:
            found.append(
                f"rouge_l: its tokenizer reads a to z and 0 to 9 alone, and {others:.0%} of the letters in test's "
                f"references are others; task.metric_tokenizer={remedy} reads them"
            )
        elif own and (left := share(_LEFT.get(tokenizer, _UNSEGMENTED))) >= ENOUGH:
            found.append(
                f"{name}: {left:.0%} of the letters in test's references are of a script without blanks, so whole "
                f"sentences count as words; task.metric_tokenizer={remedy} splits them"
            )
        elif name in _SPLITS_AT_BLANKS and whole >= ENOUGH:
            found.append(
                f"{name}: {whole:.0%} of the letters in test's references are of a script without blanks, so whole "
                "sentences count as words: it says little more than exact_match"
            )
    return found
