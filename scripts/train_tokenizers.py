"""Make the two tokenizers of the test suite: `tests/tokenizers/bpe` and `tests/tokenizers/unigram`.

    python scripts/train_tokenizers.py tests/tokenizers

What they are trained on comes with the repository: the licence, the toy world's texts, and a sentence in each of
several scripts. They differ where real tokenizers do:

    bpe       byte-level as GPT-2's: a space belongs to the word behind it, any text comes back letter by letter,
              nothing is added around a text; the marks and the template of a ChatML model
    unigram   as sentencepiece's: pieces by their likelihood, a text begins with a space of its own, white space is one
              space, what the vocabulary lacks is <unk>; a bos before every text

Pairs are counted, so `bpe` comes out the same each time. Likelihoods are sums in an order that the trainer leaves to
chance: `unigram` has the same pieces each time, and likelihoods that differ from their 14th digit on.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `iapt`, from any checkout
from iapt.data import toy

ROOT = Path(__file__).resolve().parent.parent
SIZE = 600
# Article 1 of the Universal Declaration of Human Rights.
SENTENCES = (
    "All human beings are born free and equal in dignity and rights.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "यह सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts() -> list[str]:
    """What both are trained on, the same on every call."""
    rng = random.Random(0)
    made = [toy.text(rng, toy.draw(rng)) for _ in range(200)]
    return [*(ROOT / "LICENSE").read_text(encoding="utf-8").splitlines(), *made, *SENTENCES]


def bpe() -> PreTrainedTokenizerFast:
    """Byte-level pairs, and a chat model's marks."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=marks[1], eos_token=marks[2], pad_token=marks[0], unk_token=marks[0],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = CHAT
    return made


def unigram() -> PreTrainedTokenizerFast:
    """Pieces by likelihood, and a bos."""
    marks = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=marks, unk_token=marks[0], show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=marks[0], bos_token=marks[1], eos_token=marks[2], pad_token=marks[3],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def main(folder: Path) -> None:
    """Write both into their folders."""
    for name, make in (("bpe", bpe), ("unigram", unigram)):
        make().save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
