"""Metrics on texts that are not English: the setting that lets them read, and the word where they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sacrebleu

from iapt.config.errors import ConfigError, UserError
from iapt.config.schema import Config
from iapt.config.task import METRIC_TOKENIZERS, TaskConfig
from iapt.data.task import build_task
from iapt.methods.settings import load_config
from iapt.metrics.metrics import GENERATION, check, compute
from iapt.metrics.writing_systems import notes
from iapt.runs.sweep import cell_id
from tests.test_tasks import WRITE, config_of, write

TEXTS = {
    "english": "The red ball is in the park, and she loves it.",
    "german": "Der große rote Ball liegt im schönen Park, und sie liebt ihn.",
    "chinese": "她非常喜欢公园里的那个红色的球。",
    "japanese": "彼女は公園にある赤いボールがとても好きです。",
    "thai": "เธอชอบลูกบอลสีแดงในสวนสาธารณะมาก",
    "russian": "Она очень любит красный мяч, который лежит в парке.",
    "greek": "Της αρέσει πολύ η κόκκινη μπάλα στο πάρκο.",
    "korean": "그녀는 공원에 있는 빨간 공을 아주 좋아합니다.",
    "arabic": "هي تحب الكرة الحمراء الموجودة في الحديقة كثيرا",
}
# language -> the setting that reads it
READS = {
    "english": "default", "german": "default", "chinese": "zh", "japanese": "char", "thai": "char", "russian": "intl",
    "greek": "intl", "korean": "intl", "arabic": "intl",
}  # fmt: skip


@pytest.mark.parametrize("language", TEXTS)
def test_identical_texts_score_all_with_the_setting_that_reads_them(language: str) -> None:
    text = TEXTS[language]
    values = compute(["bleu", "rouge_l"], [text], [[text]], READS[language])
    assert (values["bleu"], values["rouge_l"]) == pytest.approx((1.0, 1.0))
    half = text[: len(text) // 2]
    values = compute(["bleu", "rouge_l"], [half], [[text]], READS[language])
    assert 0 < values["rouge_l"] < 1
    assert 0 < values["bleu"] < 1


@pytest.mark.parametrize("language", TEXTS)
def test_a_word_stands_exactly_where_identical_texts_do_not_score_all(language: str) -> None:
    text = TEXTS[language]
    for name in ("bleu", "rouge_l"):
        values = compute([name], [text], [[text]])
        said = notes([name], "default", [text])
        assert bool(said) == (values[name] < 0.99)
        if said:
            assert said[0].startswith(f"{name}: ")
            assert f"task.metric_tokenizer={READS[language]} " in said[0]
    assert notes(["bleu", "rouge_l"], READS[language], [text]) == []


def test_settings_that_do_not_help_have_their_word_too() -> None:
    assert notes(["rouge_l"], "13a", [TEXTS["russian"]]) == []
    for setting in ("13a", "intl", "none"):
        assert len(notes(["bleu", "rouge_l"], setting, [TEXTS["chinese"]])) == 2
    assert "metric_tokenizer=char" in notes(["bleu"], "zh", [TEXTS["japanese"]])[0]
    [meteor, qa] = notes(["meteor", "qa_f1_em", "exact_match"], "zh", [TEXTS["chinese"]])
    assert meteor.startswith("meteor: ")
    assert qa.startswith("qa_f1_em: ")
    assert notes(["meteor", "qa_f1_em"], "default", [TEXTS["russian"]]) == []
    assert notes(["bleu", "rouge_l"], "default", []) == notes(["rouge_l"], "default", ["!?", " "]) == []


def test_a_few_letters_of_another_script_are_not_worth_a_word() -> None:
    english = [TEXTS["english"]] * 20
    assert notes(["rouge_l", "bleu"], "default", [*english, "Café Олег 球"]) == []
    assert len(notes(["rouge_l", "bleu"], "default", [*english, *[TEXTS["chinese"]] * 20])) == 2


@pytest.mark.parametrize("setting", ["13a", "intl", "zh", "char", "none"])
def test_bleu_is_sacrebleus_with_that_tokenizer(setting: str) -> None:
    predictions, references = [TEXTS["russian"], TEXTS["chinese"]], [[TEXTS["russian"][:30]], [TEXTS["chinese"][3:]]]
    values = compute(["bleu"], predictions, references, setting)
    expected = sacrebleu.corpus_bleu(predictions, [[r[0] for r in references]], tokenize=setting).score / 100
    assert values["bleu"] == pytest.approx(expected)
    assert f"|tok:{setting}|" in values["bleu_signature"]


def test_rouge_counts_the_words_of_the_setting_in_lower_case() -> None:
    values = compute(["rouge_l"], ["Мяч, красный мяч"], [["мяч красный"]], "intl")
    # мяч , красный мяч against мяч красный: common subsequence 2
    assert values["rouge_l"] == pytest.approx(2 * 2 / (4 + 2))
    assert compute(["rouge_l"], ["红球"], [["红色球"]], "zh")["rouge_l"] == pytest.approx(2 * 2 / (2 + 3))


def test_the_word_is_among_the_tasks_notes_and_the_setting_takes_it_away(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"record": f"{i}", "text": TEXTS["chinese"]} for i in range(2)]
    folder = write(tmp_path, "mine/write", train=rows, validation=rows, test=rows)
    said = [note for note in build_task(config_of(WRITE), folder).notes if note.startswith("bleu: ")]
    assert len(said) == 1
    task = build_task(config_of(WRITE, metric_tokenizer="zh"), folder)
    assert not [note for note in task.notes if note.startswith("bleu: ")]


def test_the_setting_is_checked_and_part_of_a_cell_where_it_is_set() -> None:
    base = WRITE | {"metrics": ["bleu"]}
    with pytest.raises(ConfigError, match=r"metric_tokenizer = 'jieba': allowed are default, 13a, intl, zh, char"):
        load_config(base | {"metric_tokenizer": "jieba"}, TaskConfig)
    cells = {cell_id(Config(task=config_of(base, metric_tokenizer=t))) for t in ("default", *METRIC_TOKENIZERS)}
    assert len(cells) == 1 + len(METRIC_TOKENIZERS)


def test_a_tokenizer_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def __init__(self, tokenize: str) -> None:
            raise RuntimeError("Japanese tokenization requires extra dependencies\n\n  pip ...")

    monkeypatch.setattr("sacrebleu.metrics.BLEU", Missing)
    with pytest.raises(UserError, match=r"metric_tokenizer = ja-mecab: needs a package; pip install 'sacrebleu\[ja\]'"):
        check(["bleu"], GENERATION, "ja-mecab")
