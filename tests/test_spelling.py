"""Label words and answers that are special tokens, or that the tokenizer gives back in another spelling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from iapt.config.errors import UserError
from iapt.config.task import TaskConfig
from iapt.data.batch import Encoded, encode_examples
from iapt.data.spelling import Speller
from iapt.data.task import Example
from iapt.evaluation.evaluate import evaluate
from tests.test_tasks import config_of


def tokenizer_of(lower: bool = False) -> PreTrainedTokenizerFast:
    names = ["<pad>", "</s>", "<unk>", "<s>", "<yes>", "<no>", "red", "ball", "yes", "no", "well", "<call>"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.add_special_tokens({"additional_special_tokens": ["<yes>", "<no>", "<call>"]})
    return fast


class Says:
    """Stands in for a model: generates, for every row, the ids of a text and then eos."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.backbone = type("Backbone", (), {"tokenizer": tokenizer, "pad_id": tokenizer.pad_token_id})
        self.rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]

    def train(self, mode: bool) -> None:
        pass

    def generate(self, batch: Any, **options: Any) -> torch.Tensor:
        rows = [self.rows[i] for i in batch.indices.tolist()]
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def outcome(tokenizer: Any, says: list[str], examples: list[Example], **settings: Any) -> list[dict[str, Any]]:
    base = {"name": "t", "template": "{text}", "scoring": "generation"} | settings
    task: TaskConfig = config_of(base)
    items, _ = encode_examples(
        examples, tokenizer, choices=task.label_words, separator=" ", max_length=64, max_response_length=16,
        context=None, max_new_tokens=4,
    )  # fmt: skip
    model: Any = Says(tokenizer, says)
    return evaluate(model, task, examples, items, 8, Accelerator(cpu=True)).predictions


def labelled(words: list[str], says: list[str], lower: bool = False) -> list[int]:
    examples = [Example("red ball", words[i % 2], i % 2) for i in range(len(says))]
    found = outcome(tokenizer_of(lower), says, examples, label_column="label", label_words=words)
    return [record["label"] for record in found]


def test_label_words_that_are_special_tokens_are_found_in_generated_texts() -> None:
    assert labelled(["<no>", "<yes>"], ["<no>", "<yes>", "<yes> well", "well", ""]) == [0, 1, 1, -1, -1]
    assert labelled(["<no>", "<yes>"], ["<s> <no>", "<call> <yes>"]) == [0, 1], "other special tokens are no text"


def test_plain_label_words_are_found_as_before() -> None:
    assert labelled(["no", "yes"], ["no", "yes well", "<s> yes", "<call> no", "<unk>"]) == [0, 1, 1, 0, -1]


def test_a_word_that_comes_back_in_another_spelling_is_that_word() -> None:
    assert labelled(["No", "Yes"], ["no", "yes well", "well"], lower=True) == [0, 1, -1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["no", "</s>"], "'</s>' cannot be told in a generated text, where nothing is left of it"),
        (["<pad>", "no"], "'<pad>' cannot be told in a generated text, where nothing is left of it"),
        (["no", "ja"], "'ja' cannot be told in a generated text, where nothing is left of it"),
        (["no", "<pad> no"], "'<pad> no' cannot be told in a generated text, where it reads as 'no', as 'no'"),
    ],
)
def test_words_that_no_generated_text_can_show_are_refused(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        labelled(words, ["no", "no"])
    assert str(caught.value).startswith(f"task.label_words: {says}")
    assert "task.scoring=likelihood or constrained" in str(caught.value)


def test_answers_with_special_tokens_keep_them() -> None:
    examples = [Example("red ball", "<call> ball", None, ("<call> ball",)), Example("red red", "ball", None, ("ball",))]
    found = outcome(tokenizer_of(), ["<call> ball", "<s> ball"], examples, metrics=["exact_match"])
    assert [record["text"].replace(" ", "") for record in found] == ["<call>ball", "ball"]


def test_without_such_tokens_nothing_is_read_otherwise_than_by_transformers() -> None:
    tokenizer = tokenizer_of()
    speller = Speller(tokenizer, [Encoded(0, (6, 7), (8, 2, 1), ((8,), (9,)))])
    rows = [[3, 8, 6, 1, 0], [2, 4, 9], []]
    assert speller.texts(rows) == [t.strip() for t in tokenizer.batch_decode(rows, skip_special_tokens=True)]
