"""PPT's pre-training tasks: every row is what the document says, on both sides of every split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from iapt.config.errors import ConfigError, UserError
from iapt.config.paths import CONFIG_DIR
from iapt.config.schema import to_dict
from iapt.config.task import TaskConfig
from iapt.data import plain_text, toy
from iapt.data.files import read_file
from iapt.data.task import build_task
from iapt.methods.settings import load_config
from iapt.runs.sweep import cell_id, hash_of
from tests.test_experiment import config as run_config

NEXT, CHOICE, UNIFIED = "ppt/next_sentence", "ppt/sentence_choice", "ppt/unified_choice"


def shipped(name: str, **changes: Any) -> TaskConfig:
    settings = yaml.safe_load((CONFIG_DIR / "task" / f"{name}.yaml").read_text())
    config = load_config({**settings, "carve_size": 10, "max_eval_examples": None, **changes}, TaskConfig)
    assert isinstance(config, TaskConfig)
    return config


def document(number: int, length: int = 6) -> list[str]:
    """Sentences that say where they stand."""
    return [f"This is sentence {i} of story {number}." for i in range(length)]


def place(sentence: str) -> tuple[int, int]:
    """(story, number) of such a sentence."""
    words = sentence.rstrip(".").split()
    return int(words[-1]), int(words[3])


def write(root: Path, name: str, text: str) -> str:
    (root / name).mkdir(parents=True)
    (root / name / "train.txt").write_text(text, encoding="utf-8")
    return str(root)


@pytest.fixture
def stories(tmp_path: Path) -> str:
    """Sixty stories, each broken into lines in the middle of a sentence."""
    text = "\n\n".join(" ".join(document(n)).replace("sentence 3 of", "sentence\n3 of") for n in range(60))
    for name in (NEXT, CHOICE, UNIFIED):
        write(tmp_path, name, text)
    return str(tmp_path)


def rows(config: TaskConfig, documents: list[list[str]], split: str = "train") -> list[dict[str, Any]]:
    units = [[(split, number, {"text": " ".join(d)})] for number, d in enumerate(documents, 1)]
    return [row for unit in plain_text.build_rows(config, split, units)[0] for _, _, row in unit]


# --- sentences and files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One is. Two\nis!  Three is?", ["One is.", "Two is!", "Three is?"]),
        ('He said "no." She left. (It rained.) Dry.', ['He said "no."', "She left.", "(It rained.)", "Dry."]),
        ("It is 3.5 m, see a.b.c for more", ["It is 3.5 m, see a.b.c for more"]),
        ("Wait... what?", ["Wait...", "what?"]),
        ("  \n ", []),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert plain_text.sentences(text) == expected


@pytest.mark.parametrize("line", ["\n", "\r\n"])
def test_a_txt_file_has_a_document_between_empty_lines(tmp_path: Path, line: str) -> None:
    file = tmp_path / "train.txt"
    file.write_bytes(line.join(["", "One is.", "Two is.", "", "", " \t", "Three ü.", ""]).encode())
    texts = [row["text"] for row in read_file(file)]
    assert [plain_text.sentences(text) for text in texts] == [["One is.", "Two is."], ["Three ü."]]


# --- next sentence -----------------------------------------------------------------------------------------


def test_next_sentence_pairs() -> None:
    made = rows(shipped(NEXT), [document(n) for n in range(200)])
    assert len(made) == 200 * 5 * 2
    assert Counter(row["label"] for row in made) == {0: 1000, 1: 1000}, "a right and a wrong one for each sentence"
    assert Counter(row["first"] for row in made) == {s: 2 for n in range(200) for s in document(n)[:-1]}
    relations = Counter()
    for row in made:
        (story, i), (other, j) = place(row["first"]), place(row["second"])
        if row["label"]:
            assert (other, j, row["relation"]) == (story, i + 1, 2)
        elif row["relation"]:
            assert other == story
            assert abs(j - i) > 1, "beside the first sentence stands no wrong one"
        else:
            assert other != story
        relations[row["relation"]] += 1
    assert 430 < relations[1] < 570, "half of the wrong ones are from the same story"


def test_short_documents_have_easy_wrong_answers_only() -> None:
    made = rows(shipped(NEXT), [document(n, 2) for n in range(9)] + [document(9, 1)])
    assert Counter(row["relation"] for row in made) == {2: 9, 0: 9}
    assert all(place(row["second"])[0] != 9 for row in made), "a single sentence is no document"


def test_a_wrong_sentence_never_says_what_the_right_one_says() -> None:
    """Documents that share most of their sentences."""
    documents = [[f"Begin {n}.", "Same.", "Same.", f"End {n}.", "Same."] for n in range(20)]
    wrong = [row for row in rows(shipped(NEXT), documents) if not row["label"] and row["first"] != "Same."]
    assert len(wrong) == 40
    assert "Same." not in {row["second"] for row in wrong}


def test_the_papers_three_classes() -> None:
    config = shipped("toy/next_sentence", label_column="relation", label_words=["no", "maybe", "yes"])
    task = build_task(config, None)
    assert {e.response for e in task.splits["test"]} == {"no", "maybe", "yes"}


# --- choice ------------------------------------------------------------------------------------------------


def test_sentence_choice() -> None:
    made = rows(shipped(CHOICE), [document(n) for n in range(200)])
    assert len(made) == 200 * 5
    for row in made:
        story, i = place(row["first"])
        where = [place(option) for option in row["options"]]
        assert len(set(where)) == 6
        assert where[row["label"]] == (story, i + 1)
        [near] = [j for other, j in where if other == story and j != i + 1]
        assert abs(near - i) > 1
    labels = Counter(row["label"] for row in made)
    assert all(120 < labels[i] < 220 for i in range(6)), labels


def test_as_many_options_as_label_words_and_unified_from_two_on() -> None:
    documents = [document(n) for n in range(200)]
    assert {len(row["options"]) for row in rows(shipped(CHOICE, label_words=["1", "2", "3"]), documents)} == {3}
    sizes = Counter(len(row["options"]) for row in rows(shipped(UNIFIED), documents))
    assert sorted(sizes) == list(range(2, 17))
    assert min(sizes.values()) > 30
    for row in rows(shipped(UNIFIED), documents):
        story, i = place(row["first"])
        assert place(row["options"][row["label"]]) == (story, i + 1)
        assert len(set(row["options"])) == len(row["options"])


def test_what_an_example_looks_like(stories: str) -> None:
    example = build_task(shipped(NEXT), stories).splits["train"][0]
    assert example.instruction.endswith(
        "\nSecond: This is sentence 1 of story 2.\nDoes the second sentence follow the first, yes or no? Answer:"
    )
    assert (example.response, example.label) == ("yes", 1)
    for name in (CHOICE, UNIFIED):
        example = build_task(shipped(name), stories).splits["train"][0]
        first, *options, last = example.instruction.split("\n")
        assert first == "Sentence: This is sentence 0 of story 2.", "the stories before it are in dev and test"
        assert last == "Give the letter of the sentence that follows. Answer:"
        assert f"{example.response}. This is sentence 1 of story 2." in options


# --- splits, seeds and sources -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NEXT, CHOICE, UNIFIED])
def test_no_document_is_in_two_splits(name: str, stories: str) -> None:
    task = build_task(shipped(name), stories)
    seen = {}
    for split, examples in task.splits.items():
        texts = " ".join(example.instruction for example in examples).replace("\n", " ")
        seen[split] = {n for n in range(60) if f"of story {n}." in texts}
    assert [len(seen[split]) for split in ("train", "dev", "test")] == [40, 10, 10]
    assert len(set.union(*seen.values())) == 60
    each = 10 if name == NEXT else 5
    assert [len(task.splits[split]) for split in ("train", "dev", "test")] == [40 * each, 10 * each, 10 * each]
    assert f"dev: {10 * each} rows from 10 documents" in task.notes


@pytest.mark.full
def test_rows_hang_on_split_seed_alone(stories: str) -> None:
    """Another interpreter with another hash salt makes the same rows."""
    code = "import json, sys; from tests.test_plain_text import *\n"
    code += (
        "print([build_task(shipped(n, split_seed=int(sys.argv[2])), sys.argv[1]).fingerprint for n in (NEXT, UNIFIED)])"
    )
    root = str(Path(__file__).parents[1])
    seen = [
        subprocess.run(
            [sys.executable, "-c", code, stories, seed], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": root},
        ).stdout
        for salt, seed in (("1", "0"), ("2", "0"), ("1", "5"))
    ]  # fmt: skip
    assert seen[0] == seen[1] != seen[2]


def test_the_three_splits_of_a_source_are_taken_as_they_are() -> None:
    task = build_task(shipped("toy/next_sentence", max_train_examples=None), None)
    assert {split: len(examples) for split, examples in task.splits.items()} == {
        "train": 6 * toy.SPLITS["train"], "dev": 6 * toy.SPLITS["validation"], "test": 6 * toy.SPLITS["test"],
    }  # fmt: skip
    assert task.majority("test") == 0.5


def test_documents_of_a_jsonl_file(tmp_path: Path) -> None:
    (tmp_path / NEXT).mkdir(parents=True)
    lines = [json.dumps({"text": " ".join(document(n)), "title": n}) for n in range(30)]
    (tmp_path / NEXT / "train.jsonl").write_text("\n".join(lines))
    assert len(build_task(shipped(NEXT), str(tmp_path)).splits["train"]) == 10 * 10


@pytest.mark.parametrize("name", [NEXT, CHOICE, UNIFIED])
def test_the_embedded_text_serves_every_builder(name: str) -> None:
    source = {"generator": "plain_text", "builder": shipped(name).source.builder}
    assert build_task(shipped(name, source=source, split_rule="official"), None).splits["test"]


def test_the_embedded_text_claims_what_follows_and_never_what_the_other_half_says() -> None:
    for row in toy.rows("plain_text", "test"):
        text, claim, other, last = plain_text.sentences(row["text"])
        assert len({sentence.split()[0] for sentence in (claim, last)}) == 1, "one person"
        for said, claimed in ((text, claim), (other, last)):
            value = claimed.rstrip(".").split()[-1]
            about = next(about for about, values in toy.CLASSES.items() if value in values)
            kinds, places = (
                {name for name, words in groups.items() if set(words) & set(said.replace(",", "").split())}
                for groups in (toy.KINDS, toy.WHERE)
            )
            assert about == "mood" or value in (kinds | places)


# --- messages ----------------------------------------------------------------------------------------------


def test_too_little_text(tmp_path: Path) -> None:
    folder = write(tmp_path, NEXT, "\n\n".join([*(["Just this one."] * 30), "One is. Two is."]))
    with pytest.raises(
        UserError, match="too little text .* = next_sentence: . of the .. documents of .* have two sent"
    ):
        build_task(shipped(NEXT), folder)
    with pytest.raises(UserError, match="task.carve_size = 20: 2 times that must be below the size of train, 31"):
        build_task(shipped(NEXT, carve_size=20), folder)
    with pytest.raises(UserError, match="the documents of train repeat the same few sentences; wrong answers are"):
        rows(shipped(CHOICE), [["One.", "Two."], ["Two.", "One."]])


def test_rows_without_text_and_an_unknown_builder(tmp_path: Path) -> None:
    (tmp_path / NEXT).mkdir(parents=True)
    (tmp_path / NEXT / "train.jsonl").write_text('{"txt": "One. Two."}\n' * 30)
    with pytest.raises(UserError, match=r"needs column 'text', which row \d+ of train lacks; did you mean 'txt'"):
        build_task(shipped(NEXT), str(tmp_path))
    with pytest.raises(ConfigError, match="source.builder = 'next': allowed are none, next_sentence, "):
        shipped(NEXT, source={"builder": "next"})


def test_a_sweep_knows_the_text_by_its_content_and_other_cells_as_before(tmp_path: Path) -> None:
    config = run_config(method="lora")
    settings = to_dict(config)
    del settings["task"]["source"]["builder"]
    for later in ("integer_labels", "metric_tokenizer"):
        settings["task"].pop(later, None)
    del settings["task"]["source"]["quotes"]
    del settings["preflight"]
    assert cell_id(config) == hash_of({**settings, "data": None}), "of a sweep from before there were these settings"
    config.task, config.data_dir = shipped(NEXT), write(tmp_path, NEXT, "One is. Two is.")
    before = cell_id(config)
    (tmp_path / NEXT / "train.txt").write_text("One is. Three is.")
    assert cell_id(config) != before
    config.task.source.builder, different = "sentence_choice", cell_id(config)
    assert cell_id(config) != different
