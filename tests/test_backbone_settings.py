"""What a downloaded backbone's own files say about decoding changes no result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from iapt.benchmarks.judge import Question
from iapt.benchmarks.mtbench_answers import Answerer, Layout
from iapt.config.errors import UserError
from iapt.config.schema import BackboneConfig
from iapt.config.task import TaskConfig
from iapt.folder.summary import read_summary
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import TINY_DIR, build_backbone
from iapt.runs import experiment
from tests.test_experiment import config

STEPS = 40  # after which the texts are right
# What generation_config.json holds (None: there is none), and what config.json holds besides.
FILES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "no cache": ({"use_cache": False}, {}),
    "penalties": (
        {
            "repetition_penalty": 1.8,
            "no_repeat_ngram_size": 2,
            "suppress_tokens": list(range(5, 300)),
            "min_length": 80,
        },
        {},
    ),
    "sampling": ({"do_sample": True, "temperature": 3.0, "top_k": 400, "max_length": 30, "forced_eos_token_id": 9}, {}),
    "beams": ({"num_beams": 4, "num_return_sequences": 2, "length_penalty": -5.0, "output_scores": True}, {}),
    "stops": ({"stop_strings": ["e"], "eos_token_id": [1, *range(300, 688)], "watermarking_config": {"bias": 9.0}}, {}),
    "drafts": ({"prompt_lookup_num_tokens": 3, "guidance_scale": 2.0, "token_healing": True}, {}),
    "caches": ({"cache_implementation": "static", "prefill_chunk_size": 4, "return_dict_in_generate": True}, {}),
    "impossible": ({"num_return_sequences": 3, "penalty_alpha": 0.6, "top_k": 4}, {}),
    "no cache, of old": (None, {"use_cache": False}),
    "penalties, of old": (None, {"repetition_penalty": 1.8, "num_beams": 4, "min_length": 80}),
    "caches, of old": (None, {"num_return_sequences": 3, "cache_implementation": "static"}),
}


def copy_of_tiny(folder: Path, generation: dict[str, Any] | None, more: dict[str, Any]) -> Path:
    shutil.copytree(TINY_DIR, folder)
    path = folder / "generation_config.json"
    if generation is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **generation}))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "clean"
    tiny = {"name": "tiny", "kind": "pretrained", "path": str(TINY_DIR), "shape": {}}
    trainer = {"max_steps": STEPS, "eval_every": STEPS}
    experiment.run(config("describe", backbone=tiny, trainer=trainer, task={"max_train_examples": 200}), folder)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_backbones_files_do_not_reach_a_tasks_texts(name: str, run: Path, tmp_path: Path):
    path = copy_of_tiny(tmp_path / "backbone", *FILES[name])
    found = experiment.evaluate(run, tmp_path / "eval", {"backbone": {"path": str(path)}}, "test")
    expected = read_summary(run)
    assert found.test == expected.test > 0.9
    assert (tmp_path / "eval" / "predictions.jsonl").read_text() == (run / "predictions.jsonl").read_text()


def test_a_run_on_such_files_is_the_same_run(tmp_path: Path):
    files = ({"use_cache": False, "repetition_penalty": 1.8, "eos_token_id": 1}, {"use_cache": False})
    scores = []
    for name, path in (("clean", TINY_DIR), ("other", copy_of_tiny(tmp_path / "backbone", *files))):
        backbone = {"name": "tiny", "kind": "pretrained", "path": str(path), "shape": {}}
        summary = experiment.run(config("describe", backbone=backbone), tmp_path / name)
        scores.append((summary.zero_shot, summary.dev, summary.test))
    assert scores[0] == scores[1]
    texts = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("clean", "other")]
    assert texts[0] == texts[1]


def test_a_generation_config_that_is_no_json_is_named(tmp_path: Path):
    path = copy_of_tiny(tmp_path / "backbone", {}, {})
    (path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json holds no JSON object"):
        build_backbone(BackboneConfig(name="mine", kind="pretrained", path=str(path)))


def test_the_benchmarks_decode_by_their_own_settings():
    model = AdaptedModel(build_backbone(BackboneConfig()), None)
    asked = (("The red dog sleeps .", "Why ?"), ("A cat .", "Who ?"))
    questions = [Question(number, "any", turns) for number, turns in enumerate(asked)]
    task = TaskConfig(name="any", template="{instruction}", separator=" ")

    def answers() -> list[Any]:
        found: list[Any] = [
            Answerer(model, Layout(task, None, "\n"), 12, seed=1)(questions, temperature) for temperature in (0.0, 0.7)
        ]
        try:
            from iapt.benchmarks.harness_model import AdaptedLM
        except ImportError:
            return found
        options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
        requests = [SimpleNamespace(args=(first, options)) for first, _ in asked]
        return [*found, AdaptedLM(model, 2).generate_until(requests)]

    expected = answers()
    model.lm.generation_config = GenerationConfig(
        use_cache=False,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        top_p=0.1,
        eos_token_id=300,
        forced_eos_token_id=9,
    )
    assert answers() == expected
