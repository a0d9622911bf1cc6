"""The tokenizers that come with the tests (scripts/train_tokenizers.py) and with the package, by name."""

from __future__ import annotations

import functools
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from iapt.model.backbone import TINY_DIR

TOKENIZERS = Path(__file__).parent / "tokenizers"
FOLDERS = {"bpe": TOKENIZERS / "bpe", "unigram": TOKENIZERS / "unigram", "tiny": TINY_DIR}


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDERS[name])
