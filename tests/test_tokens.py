"""Whose the special tokens are, for every way in which tokenizers add their own."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from iapt.api import attach, make_batch
from iapt.benchmarks.mtbench_answers import Answerer
from iapt.config.errors import UserError
from iapt.config.schema import BackboneConfig
from iapt.config.task import TaskConfig
from iapt.data.batch import collate, encode_examples
from iapt.data.task import Example
from iapt.data.tokens import join, opening
from iapt.evaluation.evaluate import evaluate
from iapt.methods.settings import method_config
from iapt.model.backbone import Backbone, build_backbone
from tests.shipped import FOLDERS
from tests.test_tasks import config_of

SMOL = Path(os.environ.get("IAPT_TEST_SMOLLM2", Path(__file__).parents[2] / "smollm2"))
MARKS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[gMASK]", "[CLS]", "[SEP]"]

# name -> (what it adds around a text, its bos, its eos)
KINDS = {
    "llama": ("<s> $A", "<s>", "</s>"),
    "gpt2": ("$A", "</s>", "</s>"),
    "opt": ("</s> $A", "</s>", "</s>"),
    "t5": ("$A </s>", None, "</s>"),
    "both": ("<s> $A </s>", "<s>", "</s>"),
    "chat": ("$A", "<|im_start|>", "<|im_end|>"),
    "glm": ("[gMASK] <s> $A", None, "</s>"),
    "bert": ("[CLS] $A [SEP]", "<s>", "</s>"),
}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One token a character, and the marks."""
    template, bos, eos = KINDS[kind]
    vocabulary = {name: i for i, name in enumerate([*MARKS, *" abcdefghijklmnopqrstuvwxyz:\n"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    special = [(mark, vocabulary[mark]) for mark in MARKS if mark in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=eos)
    fast.add_special_tokens({"additional_special_tokens": MARKS[1:]})
    if bos:
        fast.bos_token = bos
    return fast


def encode(tokenizer: Any, *examples: Example, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "choices": [], "separator": " ", "max_length": 64, "max_response_length": 32, "context": None,
    }  # fmt: skip
    return encode_examples(examples, tokenizer, **(settings | changes))


def spell(tokenizer: Any, ids: Any) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["", "</s>", "<|im_end|>\n<|im_start|>", "[SEP]", "</s></s>"])
def test_what_a_template_writes_stays_and_what_the_tokenizer_adds_at_the_end_goes(kind: str, end: str) -> None:
    tokenizer = tokenizer_of(kind)
    before = KINDS[kind][0].split("$A")[0].replace(" ", "")
    [item], notes = encode(tokenizer, Example(f"ab{end}", "cd"), choices=["cd", "ef"])
    assert spell(tokenizer, item.instruction) == f"{before}ab{end}"
    assert spell(tokenizer, item.response) == f" cd{KINDS[kind][2]}"
    assert [spell(tokenizer, ids) for ids in item.choices] == [" cd", " ef"]
    assert notes == []
    asked = SimpleNamespace(model=SimpleNamespace(backbone=SimpleNamespace(tokenizer=tokenizer)), _opening=None)
    assert [spell(tokenizer, ids) for ids in Answerer._tokens(asked, [f"ab{end}"])] == [f"{before}ab{end}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_that_writes_the_tokenizers_opening_gets_it_once_with_a_word(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    before = KINDS[kind][0].split("$A")[0].replace(" ", "")
    [item, other], notes = encode(tokenizer, Example(f"{before}ab", "c"), Example("ab", "c"))
    assert item.instruction == other.instruction
    assert spell(tokenizer, item.instruction) == f"{before}ab"
    assert len(notes) == bool(before)
    if before:
        assert "1 of 2 instructions write" in notes[0]
        assert all(mark in notes[0] for mark in MARKS if mark in before)


def test_an_opening_that_is_written_in_part_is_completed() -> None:
    assert join((7, 8), (8, 1)) == (7, 8, 1)
    assert join((7, 8), (7, 8, 1)) == (7, 8, 1)
    assert join((7, 8), (1, 7, 8)) == (7, 8, 1, 7, 8)
    assert join((), (7, 1)) == (7, 1)


def test_an_opening_is_found_where_the_vocabulary_knows_no_probe() -> None:
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "é": 1}, []))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert opening(fast) == ()
    assert opening(fast, ["é"]) == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_or_label_word_that_writes_its_eos_gets_no_second_one(kind: str) -> None:
    tokenizer, eos = tokenizer_of(kind), KINDS[kind][2]
    [item], _ = encode(tokenizer, Example("ab", f"c{eos}"), choices=[f"c{eos}", f"cd{eos}"])
    assert spell(tokenizer, item.response) == f" c{eos}"
    assert [spell(tokenizer, ids) for ids in item.choices] == [f" c{eos}", f" cd{eos}"]
    [item], _ = encode(tokenizer, Example("ab", "c"), choices=["c", "cd"])
    assert [spell(tokenizer, ids) for ids in item.choices] == [f" c{eos}", f" cd{eos}"]
    with pytest.raises(UserError, match="have the same tokens"):
        encode(tokenizer, Example("ab", "c"), choices=["c", f"c{eos}"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_eos_before_what_is_decoded_is_refused_or_told(kind: str) -> None:
    tokenizer, eos = tokenizer_of(kind), KINDS[kind][2]
    with pytest.raises(UserError, match=r"task\.separator = .* decoding stops at its .* the end of task\.template"):
        encode(tokenizer, Example("ab", "c"), separator=f"{eos} ", max_new_tokens=4)
    with pytest.raises(UserError, match=r"task\.label_words: decoding stops at .*, before the end of "):
        encode(tokenizer, Example("ab", "c"), choices=["c", f"d{eos}e"], max_new_tokens=4)
    [item], notes = encode(tokenizer, Example("ab", "c"), separator=f"{eos} ", choices=["c", "d"])
    assert spell(tokenizer, item.response) == f"{eos} c{eos}", "likelihoods stop nowhere"
    assert [note for note in notes if "before their end, where decoding stops" in note]
    _, notes = encode(tokenizer, Example("ab", f"c{eos}d"), Example("ab", "c"), max_new_tokens=4)
    assert notes == [f"1 of 2 responses hold {eos!r} before their end, where decoding stops"]


def test_make_batch_keeps_what_is_written() -> None:
    tokenizer = tokenizer_of("both")
    batch = make_batch(tokenizer, ["<s>ab</s>"], ["c"])
    assert spell(tokenizer, batch.instruction_ids[0].tolist()) == "<s>ab</s>"
    assert spell(tokenizer, batch.response_ids[0].tolist()) == " c</s>"


needs_smol = pytest.mark.skipif(
    not (SMOL / "tokenizer.json").is_file(), reason=f"no chat model in {SMOL} (set IAPT_TEST_SMOLLM2)"
)


@pytest.mark.parametrize("folder", [FOLDERS["bpe"], pytest.param(SMOL, marks=needs_smol)], ids=["bpe", "smollm2"])
def test_a_real_chat_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "Is it good?"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    assert text.endswith("<|im_end|>\n")
    for written in (
        text,
        text.rstrip(),
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True),
    ):
        [item], notes = encode(tokenizer, Example(written, "yes"), separator="", max_length=512)
        assert tokenizer.decode(item.instruction + item.response) == f"{written}yes<|im_end|>"
        assert tokenizer.decode(item.response) == "yes<|im_end|>"
        assert notes == []


# --- and it is learned -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_lora() -> tuple[Any, TaskConfig, list[Example], list[Any]]:
    """A LoRA trained for a moment on a template that ends in eos."""
    backbone: Backbone = build_backbone(BackboneConfig())
    eos = backbone.tokenizer.eos_token
    task = config_of(
        {
            "name": "chat", "template": f"{{text}}{eos}", "label_column": "label",
            "label_words": ["no", "yes"], "max_new_tokens": 4,
        }
    )  # fmt: skip
    words = ["red", "blue", "green", "black"]
    examples = [
        Example(f"{name} has a {word} ball.{eos}", ["no", "yes"][i % 2], i % 2)
        for name in ("Mia", "Tom", "Ana", "Ben")
        for i, word in enumerate(words)
    ]
    items, notes = encode(backbone.tokenizer, *examples, choices=task.label_words, max_new_tokens=4)
    assert notes == []
    torch.manual_seed(0)
    model = attach(backbone.lm, method_config({"name": "lora"}), tokenizer=backbone.tokenizer)
    batch = collate(items, backbone.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2))
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    return model, task, examples, items


@pytest.mark.parametrize("scoring", ["likelihood", "generation", "constrained"])
def test_a_template_that_ends_in_eos_teaches_the_answer(chat_lora: Any, scoring: str) -> None:
    model, task, examples, items = chat_lora
    assert all(item.instruction[-1] == model.backbone.tokenizer.eos_token_id for item in items)
    task = config_of(vars(task) | {"source": {}, "scoring": scoring})
    found = evaluate(model, task, examples, items, 8, Accelerator(cpu=True))
    assert found.values["accuracy"] == 1.0
    assert {record["text"] for record in found.predictions} == {"no", "yes"}


def test_plain_generate_on_the_whole_text_says_the_same(chat_lora: Any) -> None:
    model, _, examples, _ = chat_lora
    tokenizer = model.backbone.tokenizer
    for example in examples[:4]:
        ids = torch.tensor([tokenizer(example.instruction)["input_ids"]])
        out = model.lm.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == example.response
