"""What holds for any text, any lengths, any data set: tokenising, truncating, collating, splits, batches, tries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from iapt.config.errors import UserError
from iapt.config.task import SPLIT_RULES, TaskConfig
from iapt.data.batch import Encoded, collate, encode_examples, evaluation_batches, keep_end, training_batches
from iapt.data.splits import Unit, split
from iapt.data.task import Example
from iapt.data.tokens import Ids, opening
from iapt.evaluation.trie import Trie
from tests.shipped import FOLDERS, tokenizer

# No surrogates, which no file in UTF-8 can hold.
texts = st.text(st.characters(codec="utf-8"), max_size=40)
words = st.lists(st.sampled_from(["yes", "no", "Mia", "ball", "Würde", "人", "☃", ".", "\n"]), min_size=1, max_size=12)
sentences = words.map(" ".join)
token_ids = st.integers(3, 30)
strings = st.lists(token_ids, min_size=1, max_size=8).map(tuple)
kinds = pytest.mark.parametrize("kind", FOLDERS)


def encode(kind: str, *examples: Example, **changes: Any) -> tuple[list[Encoded], list[str]]:
    settings: dict[str, Any] = {
        "choices": [], "separator": " ", "max_length": 10_000, "max_response_length": 10_000, "context": None,
    }  # fmt: skip
    return encode_examples(examples, tokenizer(kind), **(settings | changes))


# --- tokenising and truncating ---------------------------------------------------------------------------------------


@kinds
@given(instruction=texts | sentences, response=texts | sentences)
def test_the_ids_are_the_whole_texts_or_those_of_its_two_parts(kind: str, instruction: str, response: str) -> None:
    tok = tokenizer(kind)
    try:
        [item], notes = encode(kind, Example(instruction, response))
    except UserError as error:
        refused = str(error)
        assert "needs at least 2 tokens" in refused or "is empty once tokenised" in refused
        return
    plain = {"add_special_tokens": False}
    whole = tok(f"{instruction} {response}", **plain)["input_ids"]
    parts = tok(instruction, **plain)["input_ids"], tok(f" {response}", **plain)["input_ids"]
    start = list(opening(tok))
    assert item.response[-1] == tok.eos_token_id
    assert list(item.instruction) == start + parts[0]
    assert [*item.instruction, *item.response[:-1]] in (start + whole, start + parts[0] + parts[1])
    assert notes == []


@kinds
@given(texts=st.lists(sentences, min_size=1, max_size=6), data=st.data())
def test_other_examples_change_nothing_but_the_index(kind: str, texts: list[str], data: st.DataObject) -> None:
    examples = [Example(f"Mia has {text}", "yes") for text in texts]
    together, _ = encode(kind, *examples, choices=["yes", "no"])
    index = data.draw(st.integers(0, len(examples) - 1))
    [alone], _ = encode(kind, examples[index], choices=["yes", "no"])
    found = together[index]
    assert found.index == index
    assert (found.instruction, found.response, found.choices) == (alone.instruction, alone.response, alone.choices)


@kinds
@given(
    rows=st.lists(st.tuples(sentences, sentences), min_size=1, max_size=5),
    limits=st.tuples(st.integers(2, 30), st.integers(1, 10)),
    context=st.none() | st.integers(5, 20),
    room=st.integers(0, 3),
)
def test_what_is_kept_fits_and_is_an_end_of_the_whole(
    kind: str, rows: list[tuple[str, str]], limits: tuple[int, int], context: int | None, room: int
) -> None:
    max_length, longest = limits
    examples, bos = [Example(f"Mia {text}", f"Tom {answer}") for text, answer in rows], tokenizer(kind).bos_token_id
    whole, _ = encode(kind, *examples)
    try:
        kept, notes = encode(
            kind, *examples, max_length=max_length, max_response_length=longest, context=context, room=room
        )
    except UserError as error:
        refused = str(error)
        assert context is not None
        assert "has no room for an instruction" in refused
        assert context - room - min(longest, max(len(e.response) for e in whole)) < 2
        return
    cut = [len(a.instruction) < len(b.instruction) for a, b in zip(kept, whole, strict=True)]
    assert any("lost their beginning" in note for note in notes) == any(cut)
    assert any("lost their end" in note for note in notes) == any(len(e.response) > longest for e in whole)
    limit = {len(item.instruction) for item, was_cut in zip(kept, cut, strict=True) if was_cut}
    assert len(limit) <= 1, "one limit for all, or an instruction's length would tell its response's"
    for item, full in zip(kept, whole, strict=True):
        assert 2 <= len(item.instruction) <= max_length
        assert item.response == full.response[:longest]
        head = item.instruction[0] == bos == full.instruction[0]
        assert full.instruction[len(full.instruction) - len(item.instruction) + head :] == item.instruction[head:]
        if context is not None:
            assert len(item.instruction) + room + max(len(e.response) for e in kept) <= context


@given(ids=strings, limit=st.none() | st.integers(1, 10), bos=st.integers(3, 30))
def test_the_end_is_kept_and_a_leading_bos(ids: Ids, limit: int | None, bos: int) -> None:
    kept = keep_end(ids, limit, bos)
    assert len(kept) == (len(ids) if limit is None else min(len(ids), limit))
    assert kept in (ids[len(ids) - len(kept) :], ids[:1] + ids[len(ids) - len(kept) + 1 :])
    assert not (ids[0] == bos and len(kept) > 1) or kept[0] == bos


# --- batches ---------------------------------------------------------------------------------------------------------


@st.composite
def encoded(draw: st.DrawFn, size: int = 20) -> list[Encoded]:
    choices = draw(st.integers(0, 3))
    labels = st.integers(0, max(choices - 1, 0)) if choices else st.none()
    return [
        Encoded(index, draw(strings), draw(strings), tuple(draw(strings) for _ in range(choices)), draw(labels))
        for index in range(draw(st.integers(1, size)))
    ]


@given(items=encoded(6), pad=st.integers(0, 30))
def test_a_batch_holds_each_row_and_padding_alone_beside_it(items: list[Encoded], pad: int) -> None:
    batch = collate(items, pad)  # even where the padding is a token of the rows

    def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[Ids]:
        assert ids.shape == mask.shape
        assert (ids[~mask] == pad).all()
        assert mask.sum(-1).max() == mask.shape[-1], "no column of padding alone"
        return [tuple(row[own].tolist()) for row, own in zip(ids, mask, strict=True)]

    assert unpadded(batch.instruction_ids, batch.instruction_mask) == [item.instruction for item in items]
    assert unpadded(batch.response_ids, batch.response_mask) == [item.response for item in items]
    assert batch.instruction_mask[:, -1].all(), "instructions end together"
    assert batch.response_mask[:, 0].all(), "and responses start together"
    assert batch.indices.tolist() == [item.index for item in items]
    if not items[0].choices:
        assert batch.choice_ids is batch.choice_mask is batch.labels is None
        return
    assert batch.choice_ids is not None
    assert batch.choice_mask is not None
    flat = unpadded(batch.choice_ids.flatten(0, 1), batch.choice_mask.flatten(0, 1))
    assert flat == [choice for item in items for choice in item.choices]
    assert batch.labels is not None
    assert batch.labels.tolist() == [item.label for item in items]


@given(items=encoded(60), size=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 9), group=st.booleans())
def test_an_epochs_batches_are_a_partition(items: list[Encoded], size: int, seed: int, epoch: int, group: bool) -> None:
    made = training_batches(items, size, seed, epoch, group)
    assert sorted(i for batch in made for i in batch) == list(range(len(items)))
    assert all(len(batch) == size for batch in made[:-1])
    assert 1 <= len(made[-1]) <= size
    assert training_batches(items, size, seed, epoch, group) == made


@given(items=encoded(60), size=st.integers(1, 9))
def test_evaluations_batches_are_a_partition_longest_first(items: list[Encoded], size: int) -> None:
    made = evaluation_batches(items, size)
    order = [i for batch in made for i in batch]
    assert sorted(order) == list(range(len(items)))
    lengths = [len(items[i].instruction) + len(items[i].response) for i in order]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch) == size for batch in made[:-1])


# --- splits ----------------------------------------------------------------------------------------------------------

# Which of the source's splits each rule may read, and whether all of their units are used.
READS = {
    "official": ("train", "validation", "test"),
    "halve_validation": ("train", "validation"),
    "carve_train": ("train", "validation"),
    "carve_train_twice": ("train",),
    "split_validation": ("validation",),
}


@pytest.mark.parametrize("rule", SPLIT_RULES)
@given(sizes=st.tuples(*[st.integers(0, 40)] * 3), carve=st.integers(1, 15), seed=st.integers(0, 99))
def test_a_rule_deals_each_unit_once(rule: str, sizes: tuple[int, int, int], carve: int, seed: int) -> None:
    config = TaskConfig(name="any", template="{x}", carve_size=carve, split_seed=seed)
    source: dict[str, list[Unit]] = {
        name: [[(name, number, {"x": number})] for number in range(size)]
        for name, size in zip(("train", "validation", "test"), sizes, strict=True)
    }
    read: list[str] = []

    def load(name: str) -> list[Unit]:
        read.append(name)
        return source[name]

    try:
        found, note = split(config, rule, load)
    except UserError as error:
        refused = str(error)
        assert "is empty under split_rule" in refused or "must be below the size of train" in refused
        return
    assert sorted(read) == sorted(READS[rule])
    dealt = [unit for name in ("train", "dev", "test") for unit in found[name]]
    assert sorted(unit[0][:2] for unit in dealt) == sorted(unit[0][:2] for name in read for unit in source[name])
    assert all(found.values())
    assert ", ".join(f"{name} {len(units)}" for name, units in found.items()) in note
    assert split(config, rule, load)[0] == found
    if rule.startswith("carve_train"):
        assert len(found["dev"]) == carve


def test_every_rule_is_dealt() -> None:
    assert set(READS) == set(SPLIT_RULES)


# --- tries -----------------------------------------------------------------------------------------------------------

STOP = 2


@given(words=st.lists(strings, min_size=1, max_size=8, unique=True), stopped=st.booleans(), data=st.data())
def test_every_walk_down_a_trie_ends_in_one_of_its_strings(
    words: list[Ids], stopped: bool, data: st.DataObject
) -> None:
    trie = Trie([(*word, STOP) if stopped else word for word in words], STOP)
    assert trie.depth == max(map(len, words)) + 1
    walked: list[int] = []
    while walked[-1:] != [STOP]:
        following = trie.following(walked)
        assert len(set(following)) == len(following)
        expected = {(*word, STOP)[len(walked)] for word in words if word[: len(walked)] == tuple(walked)}
        assert set(following) == expected
        walked.append(data.draw(st.sampled_from(following)))
    assert words[trie.find(walked)] == tuple(walked[:-1])
    assert trie.find([*walked, 7, STOP]) == trie.find(walked)
    assert trie.following(walked) == [STOP]


@given(words=st.lists(strings, min_size=1, max_size=8, unique=True), other=strings)
def test_what_is_none_of_the_strings_is_not_found(words: list[Ids], other: Ids) -> None:
    assume(other not in words)
    with pytest.raises(ValueError, match="none of the strings"):
        Trie(words, STOP).find((*other, STOP))
