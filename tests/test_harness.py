"""The lm-evaluation-harness on adapted models: its own numbers for a bare backbone, and those computed by hand."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iapt.benchmarks.harness import HarnessConfig, evaluate, problems
from iapt.config.errors import ConfigError, UserError
from iapt.config.schema import BackboneConfig
from iapt.folder.summary import read_summary
from iapt.methods.registry import spec_of
from iapt.methods.settings import method_config
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import Backbone, build_backbone
from iapt.runs import experiment
from tests.test_experiment import config

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra: pip install 'iapt[harness]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from iapt.benchmarks.harness_model import AdaptedLM, _StopStrings  # noqa: E402

BACKBONES = Path(os.environ.get("IAPT_TEST_BACKBONES", Path(__file__).parents[2] / "shared" / "backbones"))
REAL = [name for name in ("stories260K", "lab-3.4M") if (BACKBONES / name / "model.safetensors").is_file()]

PAIRS = [
    ("the red dog sleeps and the cat", " sleeps"),
    ("the red dog sleeps and the cat", " runs"),
    ("the red dog sleeps and the cat", " runs to the old house"),
    ("Question: who sleeps?\nAnswer: ", "the dog"),  # the harness moves the space to the continuation
    ("", "the cat sleeps"),
    ("", "old houses"),
    ("a", " dog"),
    ("one two three " * 20 + "and", " four"),
]
STORY = "the red dog sleeps and the old cat runs to the house . " * 80


def backbone_of(path: str | None = None) -> Backbone:
    kind = "pretrained" if path else "tiny"
    return build_backbone(BackboneConfig(name="b", kind=kind, path=path))


def adapted(backbone: Backbone, **method: Any) -> AdaptedModel:
    settings = method_config(method)
    torch.manual_seed(0)
    return AdaptedModel(backbone, spec_of(settings).build(settings, backbone))


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i, ("t", i, 1)) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module", params=["tiny", *REAL])
def pair(request: pytest.FixtureRequest) -> tuple[AdaptedModel, HFLM]:
    backbone = backbone_of(None if request.param == "tiny" else str(BACKBONES / request.param))
    theirs = HFLM(pretrained=backbone.lm, tokenizer=backbone.tokenizer, batch_size=3)
    return adapted(backbone, name="zero_shot"), theirs


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_bare_backbone_has_the_likelihoods_of_the_harness(pair: tuple[AdaptedModel, HFLM], batch_size: int) -> None:
    model, theirs = pair
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    found = AdaptedLM(model, batch_size).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert len({round(value, 3) for value, _ in found}) == len(PAIRS)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_is_told_from_not_greedy(pair: tuple[AdaptedModel, HFLM]) -> None:
    """Random continuations are never greedy: continue with what the model itself would say."""
    model, theirs = pair
    [said] = theirs.generate_until(requests("generate_until", [(PAIRS[0][0], {"until": [], "max_gen_toks": 3})]))
    both = requests("loglikelihood", [(PAIRS[0][0], said), (PAIRS[0][0], said + "!")])
    expected = theirs.loglikelihood(both, disable_tqdm=True)
    found = AdaptedLM(model, 4).loglikelihood(both, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert not found[1][1]


def test_a_bare_backbone_has_the_rolling_likelihood_of_the_harness(pair: tuple[AdaptedModel, HFLM]) -> None:
    model, theirs = pair
    texts = requests("loglikelihood_rolling", [(STORY,), ("the cat sleeps",)])
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert len(theirs.tok_encode(STORY)) > theirs.max_length  # more than one window
    assert AdaptedLM(model, 4).loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("until", [[], [" the"], ["e", "\n"]])
def test_a_bare_backbone_generates_what_the_harness_does(pair: tuple[AdaptedModel, HFLM], until: list[str]) -> None:
    model, theirs = pair
    contexts = [context for context, _ in PAIRS[2:4]] + [PAIRS[-1][0], "Once upon a time there was"]
    asked = requests("generate_until", [(c, {"until": list(until), "max_gen_toks": 24}) for c in contexts])
    expected = theirs.generate_until(asked, disable_tqdm=True)
    found = AdaptedLM(model, 2).generate_until(asked, disable_tqdm=True)
    assert found == expected
    assert any(found)
    assert not any(stop in text for stop in until for text in found)


def test_likelihoods_of_soft_prompts_by_hand() -> None:
    """Prompt tuning before the instruction is the LM on [P, context, continuation], written out."""
    backbone = backbone_of()
    model = adapted(backbone, name="prompt_tuning", num_soft_tokens=5, position="before_instruction")
    lm, tokenizer = backbone.lm, backbone.tokenizer
    soft = model.method.input_embeddings()  # type: ignore[union-attr]
    found = AdaptedLM(model, 3).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(PAIRS, found, strict=True):
        spaces = len(context) - len(context.rstrip())
        whole = tokenizer.encode(context + continuation)
        start = len(tokenizer.encode(context[: len(context) - spaces])) if context else 1
        if not context:
            whole = [tokenizer.eos_token_id, *whole]
        embeds = torch.cat([soft, backbone.embed(torch.tensor(whole[:-1]))])[None]  # type: ignore[list-item]
        with torch.no_grad():
            logits = lm(inputs_embeds=embeds).logits[0, 5:].log_softmax(-1)
        by_hand = sum(float(logits[i - 1, whole[i]]) for i in range(start, len(whole)))
        assert value == pytest.approx(by_hand, abs=1e-3)


@pytest.mark.parametrize("position", ["before_instruction", "after_instruction"])
def test_soft_tokens_of_an_instance_are_batch_free_and_matter(position: str) -> None:
    model = adapted(backbone_of(), name="iapt", position=position)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    asked = requests("loglikelihood", PAIRS)
    one, many = (AdaptedLM(model, size).loglikelihood(asked, disable_tqdm=True) for size in (1, 8))
    assert [v for v, _ in one] == pytest.approx([v for v, _ in many], abs=1e-3)
    with model.disabled():
        bare = AdaptedLM(model, 8).loglikelihood(asked, disable_tqdm=True)
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(many, bare, strict=True))


def test_what_does_not_fit_loses_its_beginning_and_is_counted() -> None:
    backbone = backbone_of()
    model = adapted(backbone, name="prompt_tuning", num_soft_tokens=4)
    lm = AdaptedLM(model, 2, max_length=12)
    long, options = "the red dog sleeps and the old cat runs " * 3 + "to", [" a", " the house", " the old house"]
    found = lm.loglikelihood(requests("loglikelihood", [(long, o) for o in options]), disable_tqdm=True)
    longest = max(len(lm._encode_pair(long, option)[1]) for option in options)
    # Every option sees the same context: what fits before the longest.
    shown = backbone.tokenizer.encode(long)[-(12 - longest + 1) :]
    pairs = [(None, shown, lm._encode_pair(long, option)[1]) for option in options]
    whole = AdaptedLM(model, 2)._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert [v for v, _ in found] == pytest.approx([v for v, _ in whole], abs=1e-3)
    assert lm.notes() == ["1 contexts of likelihood requests lost their beginning (12 tokens fit)"]
    lm.generate_until(
        requests("generate_until", [(long, {"until": [], "max_gen_toks": 4}), ("the cat", {"max_gen_toks": 4})])
    )
    assert lm.cut == {"likelihood": 1, "generation": 1}
    assert AdaptedLM(model, 2).max_length == 512 - 4
    with pytest.raises(UserError, match="256 new tokens leave no room for a context in 12"):
        lm.generate_until(requests("generate_until", [(long, {"until": []})]))
    for context in ("the", "the red"):
        with pytest.raises(UserError, match="leaves no room for its context in 12"):
            lm.loglikelihood(requests("loglikelihood", [(context, long)]), disable_tqdm=True)
    with pytest.raises(UserError, match="empty once tokenised"):
        lm.loglikelihood(requests("loglikelihood", [("the", "")]), disable_tqdm=True)


def test_a_leading_bos_survives_the_cut() -> None:
    from iapt.data.batch import keep_end

    assert keep_end((1, 2, 3, 4, 5), 3, bos=1) == (1, 4, 5)
    assert keep_end((2, 2, 3, 4, 5), 3, bos=1) == (3, 4, 5)
    assert keep_end((1, 2, 3), 3, bos=1) == keep_end((1, 2, 3), None, bos=1) == (1, 2, 3)


def test_a_stop_string_may_not_reach_into_the_instruction() -> None:
    tokenizer = backbone_of().tokenizer
    newline = tokenizer.encode("\n")
    stop = _StopStrings(tokenizer, ["\n\n"])
    rows = torch.tensor([[0, *newline], [0, *newline]])
    first = torch.tensor([newline[-1:], tokenizer.encode(" a")[-1:]])
    ids = torch.cat([rows, first], 1)
    assert stop(ids, None).tolist() == [False, False]
    ids = torch.cat([ids, torch.tensor([newline[-1:], newline[-1:]])], 1)
    assert stop(ids, None).tolist() == [True, False]
    ids = torch.cat([ids, torch.tensor([[0], newline[-1:]])], 1)
    assert stop(ids, None).tolist() == [True, True]  # once done, done


# --- the command ------------------------------------------------------------------------------------------

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Who {{{{verb}}}}?\\nAnswer:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "Who {{{{verb}}}}?\\nAnswer:"
doc_to_target: "{{{{options[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
ROWS = [
    {"verb": verb, "options": ["dog", "cat", "old house"], "label": i % 3}
    for i, verb in enumerate(("sleeps", "runs", "sings", "waits", "falls"))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run in run/, its tasks in tasks/."""
    root = tmp_path_factory.mktemp("harness")
    experiment.run(config(zero_shot=False), root / "run")
    (root / "tasks").mkdir()
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("mine_choice", CHOICE), ("mine_write", WRITE)):
        (root / "tasks" / f"{name}.yaml").write_text(text.format(name=name, data=data, cache=root / "cache"))
    return root


def test_tasks_of_ones_own_end_in_the_eval_folder(place: Path, iapt_eval: Callable[..., Any]) -> None:
    options = (f"checkpoint={place / 'run'}", f"harness.include_path={place / 'tasks'}", "harness.batch_size=2")
    code, out, err = iapt_eval(*options, "harness.tasks=[mine_choice]", "harness.limit=4", "hydra.run.dir=here")
    assert code == 0, err
    summary = read_summary(Path("here"))
    samples = [json.loads(line) for line in Path("here/harness_samples.jsonl").read_text().splitlines()]
    results = json.loads(Path("here/harness.json").read_text())
    assert [sample["task"] for sample in samples] == ["mine_choice"] * 4

    # By hand: the likelihood of each option, straight from the model's loss.
    from iapt.runs.restore import batch_of, build_model, read_saved

    model, _ = build_model(read_saved(place / "run", {}))
    tokenizer, right = model.backbone.tokenizer, []
    for row in ROWS[:4]:
        context = f"Who {row['verb']}?\nAnswer:"
        ids = tuple(tokenizer.encode(context))
        tails = [tuple(tokenizer.encode(f"{context} {option}"))[len(ids) :] for option in row["options"]]  # type: ignore[attr-defined]
        scores = [-float(model.loss(batch_of(model, [ids], [tail]), "sum").detach()) for tail in tails]
        right.append(scores.index(max(scores)) == row["label"])
    model.detach()
    expected = sum(right) / 4
    assert results["results"]["mine_choice"]["acc,none"] == summary.test == expected
    assert summary.metrics["test"]["mine_choice"]["acc"] == expected
    assert (summary.task, summary.metric, summary.status) == ("harness/mine_choice", "acc", "ok")
    assert summary.harness["n_samples"]["mine_choice"]["effective"] == 4
    assert f"mine_choice acc {expected:.4f}" in summary.note
    assert summary.versions["lm_eval"]
    assert f"{100 * expected:.1f}" in out
    assert "mine_choice" in out

    before = Path("here/summary.json").read_bytes()
    code, _, err = iapt_eval(*options, "harness.tasks=[mine_choice]", "hydra.run.dir=here")
    assert code == 2
    assert "already holds a finished run" in err
    assert Path("here/summary.json").read_bytes() == before


@pytest.mark.full
def test_two_tasks_have_no_single_number(place: Path, iapt_eval: Callable[..., Any]) -> None:
    code, out, err = iapt_eval(
        f"checkpoint={place / 'run'}", f"harness.include_path={place / 'tasks'}", "harness.tasks=[mine_*]",
        "harness.gen_kwargs={max_gen_toks: 3}", "hydra.run.dir=here",
    )  # fmt: skip
    assert code == 0, err
    summary = read_summary(Path("here"))
    assert set(summary.metrics["test"]) == {"mine_choice", "mine_write"}
    assert (summary.test, summary.metric) == (None, None)
    samples = [json.loads(line) for line in Path("here/harness_samples.jsonl").read_text().splitlines()]
    assert {sample["task"] for sample in samples} == {"mine_choice", "mine_write"}
    assert len(samples) == 2 * len(ROWS)
    assert "mine_write exact_match" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("harness.task=[x]", ["harness.task = ", "did you mean 'tasks'?"]),
        ("harness.tasks=[x] harness.limit=0", ["harness.limit = 0: must be above 0"]),
        ("harness.tasks=[x] harness.num_fewshot=-1", ["harness.num_fewshot = -1: must be at least 0"]),
        ("harness.tasks=[x] harness.include_path=nowhere", ["harness.include_path = 'nowhere': no such folder"]),
        ("harness.limit=3", ["harness.limit = 3.0: does nothing without harness.tasks"]),
        ("harness.tasks=[x] mt_bench.questions=q.jsonl", ["one benchmark at a time"]),
        ("harness.tasks=[mmlu_astronomi]", ["not known: mmlu_astronomi (did you mean mmlu_astronomy"]),
    ],
)
def test_bad_input(place: Path, iapt_eval: Callable[..., Any], arguments: str, words: list[str]) -> None:
    code, out, err = iapt_eval(f"checkpoint={place / 'run'}", *arguments.split())
    assert code == 2
    assert "Traceback" not in out + err
    for word in words:
        assert word in err
    assert not [p for p in Path().rglob("*") if p.is_file()]


def test_without_the_extra_there_is_one_line_with_the_remedy(
    iapt_eval: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))
    assert problems(HarnessConfig()) == []
    code, _, err = iapt_eval("checkpoint=x", "harness.tasks=[mmlu]")
    assert code == 2
    assert "pip install 'iapt[harness]'" in err
    assert len(err.splitlines()) == 3  # that torch is loading, the count of problems, the problem


def test_data_that_cannot_be_loaded(place: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    text = CHOICE.format(name="broken", data=tmp_path / "nothing.jsonl", cache=tmp_path / "cache")
    (tmp_path / "tasks" / "broken.yaml").write_text(text)
    settings = HarnessConfig(tasks=["broken"], include_path=str(tmp_path / "tasks"))
    with pytest.raises(UserError, match=r"harness.tasks = \['broken'\]: could not be loaded"):
        evaluate(place / "run", tmp_path / "out", {}, settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["in_context", "ptec", "sciprompt"])
def test_a_method_made_for_its_tasks_text_or_labels_is_refused(tmp_path: Path, method: str) -> None:
    experiment.run(config("sentiment", method, zero_shot=False), tmp_path / "run")
    with pytest.raises(UserError, match=f"method {method} is made for the text or labels"):
        evaluate(tmp_path / "run", tmp_path / "out", {}, HarnessConfig(tasks=["mmlu"]))


def test_other_settings_of_the_run_may_be_given_but_must_fit(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trainer.eval_batch_size = 0"):
        evaluate(place / "run", tmp_path / "out", {"trainer": {"eval_batch_size": 0}}, HarnessConfig(tasks=["mmlu"]))
