"""Token ids of instructions, responses and choices; what is cut; padding; the order of batches."""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from iapt.config.errors import UserError
from iapt.config.paths import CONFIG_DIR
from iapt.config.task import TaskConfig
from iapt.data.batch import Batch, Encoded, collate, encode_examples, evaluation_batches, training_batches
from iapt.data.task import Example, build_task
from iapt.methods.settings import load_config

SHARED = Path(__file__).parents[2] / "shared"
DATA = Path(os.environ.get("IAPT_TEST_DATA", SHARED / "data"))
LAB = SHARED / "backbones" / "lab-3.4M"
needs_lab = pytest.mark.skipif(not LAB.is_dir(), reason=f"no backbone in {LAB}")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA} (set IAPT_TEST_DATA)")
PAD, BOS, EOS = 0, 1, 2


def characters(merges: tuple[str, ...] = (), *, bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """One token a character, plus `merges`: pairs of characters that become one token wherever they meet."""
    names = ["<pad>", "<s>", "</s>", *" ▁abcdefghijklmnopqrstuvwxyz:", *merges]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(m[0], m[1]) for m in merges]))
    template = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def encode(examples: list[Example], tokenizer: Any, **changes: Any) -> tuple[list[Encoded], list[str]]:
    settings: dict[str, Any] = {
        "choices": [],
        "separator": " ",
        "max_length": 64,
        "max_response_length": 16,
        "context": None,
    }
    return encode_examples(examples, tokenizer, **(settings | changes))


def spell(tokenizer: Any, ids: tuple[int, ...]) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(list(ids)))


def test_the_response_is_what_the_whole_text_adds() -> None:
    tokenizer = characters((" y",))
    [item], notes = encode([Example("ab:", "yes")], tokenizer)
    assert spell(tokenizer, item.instruction) == ["<s>", "a", "b", ":"]
    assert spell(tokenizer, item.response) == [" y", "e", "s", "</s>"]
    assert (item.index, item.choices, notes) == (0, (), [])


def test_a_merge_across_the_boundary_falls_back_to_the_response_alone() -> None:
    tokenizer = characters(("by",))
    [item], _ = encode([Example("ab", "yes")], tokenizer, separator="")
    assert spell(tokenizer, item.instruction) == ["<s>", "a", "b"]
    assert spell(tokenizer, item.response) == ["y", "e", "s", "</s>"]


def test_examples_that_end_differently_share_nothing() -> None:
    tokenizer = characters(("by",))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    items, _ = encode([Example("ab", "yes"), Example("ac", "yes")], tokenizer, separator="")
    assert spell(tokenizer, items[0].response) == ["▁", "y", "e", "s", "</s>"]
    assert spell(tokenizer, items[1].response) == ["y", "e", "s", "</s>"]


def test_an_eos_of_the_tokenizers_own_is_taken_off() -> None:
    tokenizer = characters(eos=True)
    assert tokenizer("ab")["input_ids"][-1] == EOS
    [item], _ = encode([Example("ab", "c")], tokenizer, choices=["c", "d"])
    assert spell(tokenizer, item.instruction) == ["<s>", "a", "b"]
    assert spell(tokenizer, item.response) == [" ", "c", "</s>"]
    assert [spell(tokenizer, c) for c in item.choices] == [[" ", "c"], [" ", "d"]]


def test_add_eos_is_a_switch_and_needs_an_eos() -> None:
    tokenizer = characters()
    assert encode([Example("ab", "c")], tokenizer, add_eos=False)[0][0].response[-1] != EOS
    tokenizer.eos_token = None
    assert len(encode([Example("ab", "c")], tokenizer)[0][0].response) == 2


def test_choices_end_in_eos_only_when_one_begins_another() -> None:
    tokenizer = characters()
    [item], _ = encode([Example("ab", "no")], tokenizer, choices=["no", "yes"])
    assert [spell(tokenizer, c)[-1] for c in item.choices] == ["o", "s"]
    [item], _ = encode([Example("ab", "no")], tokenizer, choices=["no", "yes", "not"])
    assert [spell(tokenizer, c)[-1] for c in item.choices] == ["</s>"] * 3
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="one is the beginning of another, and the tokenizer has no eos"):
        encode([Example("ab", "no")], tokenizer, choices=["no", "not"])


def test_label_words_must_differ_in_tokens() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "ab": 4}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(UserError, match=r"'yes' and 'no' have the same tokens \(3,\)"):
        encode([Example("ab ab", "no")], fast, choices=["yes", "no"])


def test_a_response_that_is_no_choice_keeps_its_own_ids() -> None:
    tokenizer = characters()
    [item], _ = encode([Example("ab", "it is c")], tokenizer, choices=["c", "d"])
    assert spell(tokenizer, item.response) == [*" it is c", "</s>"]


# --- what is cut ------------------------------------------------------------------------------------------


def test_long_instructions_lose_their_beginning_but_not_bos() -> None:
    tokenizer = characters()
    items, notes = encode([Example("abcdefghij", "x"), Example("abc", "x")], tokenizer, max_length=5)
    assert spell(tokenizer, items[0].instruction) == ["<s>", "g", "h", "i", "j"]
    assert spell(tokenizer, items[1].instruction) == ["<s>", "a", "b", "c"]
    assert notes == ["1 of 2 instructions lost their beginning (max_length=5)"]
    items, _ = encode([Example("abcdefghij", "x")], characters(bos=False), max_length=5)
    assert spell(tokenizer, items[0].instruction) == ["f", "g", "h", "i", "j"]


def test_long_responses_lose_their_end() -> None:
    tokenizer = characters()
    items, notes = encode([Example("ab", "abcd"), Example("ab", "abc")], tokenizer, max_response_length=5)
    assert spell(tokenizer, items[0].response) == [" ", "a", "b", "c", "d"]
    assert spell(tokenizer, items[1].response) == [" ", "a", "b", "c", "</s>"]
    assert notes == ["1 of 2 responses lost their end (max_response_length=5)"]


def test_the_context_cuts_every_instruction_alike() -> None:
    tokenizer = characters()
    long = "abcdefghijklmnop"
    items, notes = encode([Example(long, "xyz"), Example(long, "x")], tokenizer, context=16, room=2)
    # the longest response has 5 tokens: 16 - 2 - 5 = 9 are left, for the short response's instruction as well
    assert [len(item.instruction) for item in items] == [9, 9]
    assert items[0].instruction == items[1].instruction, "the response must not show in the instruction"
    assert notes == ["2 of 2 instructions lost their beginning (9 of the context's 16 tokens are left for them)"]
    [item, _], _ = encode([Example(long, "xyz"), Example(long, "x")], tokenizer, context=16, max_new_tokens=10)
    assert len(item.instruction) == 6
    [item], _ = encode([Example(long, "x")], tokenizer, context=16, choices=["x", "wwwwww"])
    assert len(item.instruction) == 16 - 7
    [item], _ = encode([Example(long, "x")], tokenizer, context=400)
    assert len(item.instruction) == 17


def test_a_context_without_room() -> None:
    with pytest.raises(UserError, match=r"context of 8 tokens has no room .* beside 4 soft tokens and responses of 3"):
        encode([Example("abcdef", "x")], characters(), context=8, room=4)


def test_an_instruction_needs_two_tokens() -> None:
    with pytest.raises(UserError, match=r"example 1 \('b'\): an instruction needs at least 2 tokens"):
        encode([Example("ab", "x"), Example("b", "x")], characters(bos=False))
    with pytest.raises(UserError, match=r"example 0 \(''\)"):
        encode([Example("", "x")], characters())


def test_a_response_of_no_token() -> None:
    with pytest.raises(UserError, match=r"example 1 \('ab'\): response 'É' is empty once tokenised"):
        encode([Example("ab", "x"), Example("ab", "É")], characters(), separator="")


def test_a_label_word_longer_than_the_limit() -> None:
    with pytest.raises(UserError, match=r"trainer\.max_response_length = 3: the label word 'long' takes 5 tokens"):
        encode([Example("ab", "x")], characters(), choices=["x", "long"], max_response_length=3)


# --- real tokenizer, real tasks ---------------------------------------------------------------------------


def one_by_one(tokenizer: Any, instruction: str, text: str) -> tuple[list[int], list[int]]:
    """The rule as written, for one text, with nothing shared."""
    start = tokenizer(instruction)["input_ids"]
    whole = tokenizer(instruction + text)["input_ids"]
    if whole[: len(start)] == start:
        return start, whole[len(start) :]
    return start, tokenizer(text, add_special_tokens=False)["input_ids"]


@needs_lab
@needs_data
@pytest.mark.parametrize("folder", ["lab-3.4M", "stories260K", "babyllama-tok105-0.9M"])
@pytest.mark.parametrize("name", ["glue/rte", "glue/sst2", "superglue/copa", "superglue/boolq", "e2e"])
def test_sharing_between_examples_changes_nothing(name: str, folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "backbones" / folder)
    raw = yaml.safe_load((CONFIG_DIR / "task" / f"{name}.yaml").read_text()) | {"max_train_examples": 1}
    if name.endswith("boolq"):
        raw["split_rule"] = "split_validation"
    config = load_config(raw, TaskConfig)
    task = build_task(config, str(DATA))
    examples = task.splits["test"]
    items, notes = encode(examples, tokenizer, choices=task.choices, max_length=10**6, max_response_length=10**6)
    assert notes == []
    for item in random.Random(0).sample(items, min(100, len(items))):
        example = examples[item.index]
        start, tail = one_by_one(tokenizer, example.instruction, " " + example.response)
        assert list(item.instruction) == start
        assert list(item.response) == [*tail, tokenizer.eos_token_id]
        for word, ids in zip(task.choices, item.choices, strict=True):
            assert list(ids) == one_by_one(tokenizer, example.instruction, " " + word)[1]


@needs_lab
def test_real_tokens_read_as_the_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LAB)
    [item], _ = encode([Example("Is it good? Answer:", "not at all")], tokenizer)
    assert tokenizer.decode(item.instruction + item.response) == "<s>Is it good? Answer: not at all</s>"


# --- padding ----------------------------------------------------------------------------------------------


def test_collate() -> None:
    items = [Encoded(7, (5, 6, 7), (8,), ((9,), (10, 11))), Encoded(3, (5, 6), (8, 9), ((12, 13, 14), (15,)))]
    batch = collate(items, pad_id=PAD)
    assert len(batch) == 2
    assert batch.instruction_ids.tolist() == [[5, 6, 7], [PAD, 5, 6]]
    assert batch.instruction_mask.tolist() == [[True, True, True], [False, True, True]]
    assert batch.response_ids.tolist() == [[8, PAD], [8, 9]]
    assert batch.response_mask.tolist() == [[True, False], [True, True]]
    assert batch.choice_ids is not None
    assert batch.choice_mask is not None
    assert batch.choice_ids.tolist() == [[[9, 0, 0], [10, 11, 0]], [[12, 13, 14], [15, 0, 0]]]
    assert batch.choice_mask.sum(-1).tolist() == [[1, 2], [3, 1]]
    assert batch.indices.tolist() == [7, 3]
    assert batch.instruction_ids.dtype == batch.choice_ids.dtype == torch.int64
    assert batch.instruction_mask.dtype == batch.choice_mask.dtype == torch.bool


def test_a_batch_knows_its_labels_if_every_example_does() -> None:
    known = [Encoded(0, (5, 6), (8,), ((8,), (9,)), label=1), Encoded(1, (5, 6), (9,), ((8,), (9,)), label=0)]
    labels = collate(known, pad_id=PAD).labels
    assert labels is not None
    assert labels.tolist() == [1, 0]
    assert collate([known[0], replace(known[1], label=None)], pad_id=PAD).labels is None


def test_a_batch_without_choices_moves_to_a_device() -> None:
    batch = collate([Encoded(0, (5, 6), (8,), ())], pad_id=PAD).to("meta")
    assert isinstance(batch, Batch)
    assert batch.choice_ids is None
    assert batch.choice_mask is None
    assert {t.device.type for t in vars(batch).values() if t is not None} == {"meta"}


# --- order ------------------------------------------------------------------------------------------------


def items_of(count: int) -> list[Encoded]:
    rng = random.Random(0)
    return [Encoded(i, (5,) * rng.randint(2, 60), (6,) * rng.randint(1, 9), ()) for i in range(count)]


def length(item: Encoded) -> int:
    return len(item.instruction) + len(item.response)


def padding(items: list[Encoded], batches: list[list[int]]) -> int:
    return sum(max(length(items[i]) for i in b) * len(b) - sum(length(items[i]) for i in b) for b in batches)


def test_evaluation_goes_from_long_to_short() -> None:
    items = items_of(50)
    batches = evaluation_batches(items, 8)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(50))
    assert [length(items[i]) for i in order] == sorted((length(i) for i in items), reverse=True)
    assert [len(b) for b in batches] == [8] * 6 + [2]


@pytest.mark.parametrize("grouped", [False, True])
def test_training_batches(grouped: bool) -> None:
    items = items_of(331)
    batches = training_batches(items, 8, seed=1, epoch=0, group_by_length=grouped)
    assert sorted(i for batch in batches for i in batch) == list(range(331))
    assert [len(b) for b in batches] == [8] * 41 + [3]
    assert batches == training_batches(items, 8, seed=1, epoch=0, group_by_length=grouped)
    assert batches != training_batches(items, 8, seed=1, epoch=1, group_by_length=grouped)
    assert batches != training_batches(items, 8, seed=2, epoch=0, group_by_length=grouped)


def test_grouping_by_length_saves_padding_and_keeps_the_order_random() -> None:
    items = items_of(2000)
    plain = training_batches(items, 8, seed=1, epoch=0, group_by_length=False)
    grouped = training_batches(items, 8, seed=1, epoch=0, group_by_length=True)
    assert padding(items, grouped) < 0.2 * padding(items, plain)
    longest = [max(length(items[i]) for i in batch) for batch in grouped]
    rises = sum(a < b for a, b in itertools.pairwise(longest))
    assert 0.3 < rises / len(longest) < 0.7
    assert min(longest[:20]) < 30 < max(longest[:20])
