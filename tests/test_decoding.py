"""Every option of transformers' generation config: as in plain `generate` on the whole prompt, or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

import iapt
from iapt.config.errors import UserError
from iapt.data.batch import Batch
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import TINY_DIR
from iapt.model.decoding import ARGUMENTS, REFUSED, WORKING, end_tokens
from tests.contracts.conftest import VOCABULARY, Case, batch, build_backbone, build_model, examples

STEPS = 6
ROWS = 4
WORDS = AutoTokenizer.from_pretrained(TINY_DIR)  # a vocabulary of pieces of words
# Options for a prompt of `width` tokens whose greedy continuation of row 0 is `g`; what they have to differ from.
Options = dict[str, Any]
SAMPLES = {"do_sample": True}
BEAMS = {"num_beams": 3}
SCORES = {"return_dict_in_generate": True, "output_scores": True}
ACTING: dict[str, Callable[[int, list[int]], tuple[Options, Options]]] = {
    "max_length": lambda width, g: ({"max_length": width + 3, "max_new_tokens": None}, {}),
    "max_new_tokens": lambda width, g: ({"max_new_tokens": 3}, {}),
    "min_length": lambda width, g: ({"eos_token_id": g[1], "min_length": width + 4}, {"eos_token_id": g[1]}),
    "min_new_tokens": lambda width, g: ({"eos_token_id": g[1], "min_new_tokens": 4}, {"eos_token_id": g[1]}),
    "max_time": lambda width, g: ({"max_time": 1e-9}, {}),
    "stop_strings": lambda width, g: ({"stop_strings": WORDS.decode([g[2]]), "tokenizer": WORDS}, {}),
    "eos_token_id": lambda width, g: ({"eos_token_id": [VOCABULARY - 1, g[2]]}, {}),
    "pad_token_id": lambda width, g: ({"eos_token_id": g[1], "pad_token_id": 5}, {"eos_token_id": g[1]}),
    "early_stopping": lambda width, g: (
        {**BEAMS, "eos_token_id": list(range(0, VOCABULARY, 3)), "length_penalty": 4.0, "early_stopping": True},
        {**BEAMS, "eos_token_id": list(range(0, VOCABULARY, 3)), "length_penalty": 4.0, "early_stopping": "never"},
    ),
    "do_sample": lambda width, g: (SAMPLES, {}),
    "num_beams": lambda width, g: (BEAMS, {}),
    "num_return_sequences": lambda width, g: ({**SAMPLES, "num_return_sequences": 3}, SAMPLES),
    "length_penalty": lambda width, g: (
        {**BEAMS, "eos_token_id": list(range(0, VOCABULARY, 3)), "length_penalty": 9.0},
        {**BEAMS, "eos_token_id": list(range(0, VOCABULARY, 3)), "length_penalty": -9.0},
    ),
    "temperature": lambda width, g: ({**SAMPLES, "temperature": 3.0}, SAMPLES),
    "top_k": lambda width, g: ({**SAMPLES, "top_k": 2}, SAMPLES),
    "top_p": lambda width, g: ({**SAMPLES, "top_p": 0.3}, SAMPLES),
    "min_p": lambda width, g: ({**SAMPLES, "min_p": 0.6}, SAMPLES),
    "top_h": lambda width, g: ({**SAMPLES, "top_h": 0.3}, SAMPLES),
    "typical_p": lambda width, g: ({**SAMPLES, "typical_p": 0.2}, SAMPLES),
    "epsilon_cutoff": lambda width, g: ({**SAMPLES, "epsilon_cutoff": 0.3}, SAMPLES),
    "eta_cutoff": lambda width, g: ({**SAMPLES, "eta_cutoff": 0.3}, SAMPLES),
    "repetition_penalty": lambda width, g: ({"repetition_penalty": 5.0}, {}),
    "encoder_repetition_penalty": lambda width, g: ({"encoder_repetition_penalty": 0.1}, {}),
    "no_repeat_ngram_size": lambda width, g: ({"no_repeat_ngram_size": 1}, {}),
    "encoder_no_repeat_ngram_size": lambda width, g: ({"encoder_no_repeat_ngram_size": 1}, {}),
    "bad_words_ids": lambda width, g: ({"bad_words_ids": [[g[0], g[1]]]}, {}),
    "sequence_bias": lambda width, g: ({"sequence_bias": {(g[0], g[1]): -50.0, (g[2],): -50.0}}, {}),
    "suppress_tokens": lambda width, g: ({"suppress_tokens": [g[1]]}, {}),
    "begin_suppress_tokens": lambda width, g: ({"begin_suppress_tokens": [g[0]]}, {}),
    "forced_eos_token_id": lambda width, g: ({"forced_eos_token_id": 9}, {}),
    "exponential_decay_length_penalty": lambda width, g: (
        {"eos_token_id": 9, "exponential_decay_length_penalty": (2, 9.0)},
        {"eos_token_id": 9},
    ),
    "renormalize_logits": lambda width, g: ({**SCORES, "renormalize_logits": True}, SCORES),
    "watermarking_config": lambda width, g: ({"watermarking_config": WatermarkingConfig(bias=40.0)}, {}),
    "output_scores": lambda width, g: (SCORES, {"return_dict_in_generate": True}),
    "output_logits": lambda width, g: (
        {"return_dict_in_generate": True, "output_logits": True},
        {"return_dict_in_generate": True},
    ),
    "return_dict_in_generate": lambda width, g: ({"return_dict_in_generate": True}, {}),
}
# Options that plain transformers does not act on either, here, and why.
INERT: dict[str, tuple[Any, str]] = {
    "forced_bos_token_id": (9, "acts on sequences of one token, and an instruction has two at least"),
    "bos_token_id": (9, "begins sequences that are given no ids"),
    "remove_invalid_values": (True, "acts on scores that are not numbers"),
    "disable_compile": (True, "no cache that grows is compiled for"),
    "compile_config": (CompileConfig(), "no cache that grows is compiled for"),
}


def prompts(count: int = ROWS) -> Batch:
    return batch(examples(ROWS)[:count])


def plain(lm: Any, shown: Batch, **options: Any) -> Any:
    """transformers' own generate on the whole prompts, which is left-padded."""
    torch.manual_seed(0)
    given = {"max_new_tokens": STEPS, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False, **options}
    mask = shown.instruction_mask.long()
    out = lm.generate(input_ids=shown.instruction_ids, attention_mask=mask, **given)
    return _new(out, shown)


def ours(model: AdaptedModel, shown: Batch, **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(shown, **{"max_new_tokens": STEPS, **options})


def _new(out: Any, shown: Batch) -> Any:
    width = shown.instruction_ids.shape[1]
    if isinstance(out, Tensor):
        return out[:, width:]
    out["sequences"] = out["sequences"][:, width:]
    return out


def same(one: Any, other: Any) -> bool:
    """Whether two results have the same ids, and close scores; caches are not compared."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    names = {"sequences", "scores", "logits", "sequences_scores", "beam_indices"}
    found = [{k: v for k, v in out.items() if k in names} for out in (one, other)]
    try:
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    except (AssertionError, ValueError):
        return False
    return set(one) <= names


@pytest.fixture(scope="module", params=["bare", "switched off"])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "bare":
        yield AdaptedModel(build_backbone("llama"), None)
        return
    built = build_model(Case("iapt", {"bottleneck": 8}), "llama")
    with built.disabled():
        yield built


def option_names() -> set[str]:
    return {n for n in vars(GenerationConfig()) if not n.startswith("_")} - {"transformers_version"}


def test_every_option_of_this_release_is_sorted():
    """One that a new release adds fails here, and is refused until it is sorted."""
    sorted_so_far = WORKING | set(REFUSED)
    assert option_names() - sorted_so_far == set()
    arguments = set(inspect.signature(GenerationMixin.generate).parameters)
    # `inputs` is our `input_ids`; a generation config is taken apart.
    assert arguments - {"self", "kwargs", "inputs", "generation_config"} <= ARGUMENTS | set(REFUSED)
    assert not WORKING & set(REFUSED)
    assert not ARGUMENTS & sorted_so_far
    assert {*ACTING, *INERT, "use_cache"} - {"use_cache"} == WORKING


@pytest.mark.parametrize("name", sorted(option_names() & WORKING))
def test_an_option_acts_as_in_plain_transformers(name: str, model: AdaptedModel):
    """Batched with padding on the left, and each row by itself; and it does act."""
    lm, acted = model.lm, False
    batches = [prompts(), *(batch([item]) for item in examples(ROWS))]
    for shown in batches:
        greedy = plain(lm, shown)[0].tolist()
        if name in INERT:
            options, without = {name: INERT[name][0]}, {}
        else:
            options, without = ACTING[name](shown.instruction_ids.shape[1], greedy)
        expected = plain(lm, shown, **options)
        assert same(ours(model, shown, **options), expected)
        acted = acted or not same(expected, plain(lm, shown, **without))
    assert acted == (name not in INERT)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_work_is_refused_by_name(name: str, model: AdaptedModel, monkeypatch: pytest.MonkeyPatch):
    active = False if name == "use_cache" else 7 if name == "num_beam_groups" else "something"
    monkeypatch.setattr(model, "prefill", None)  # nothing has run
    with pytest.raises(UserError, match=rf"^generate: {name} = .*: cannot be used, [^\n]*$"):
        model.generate(prompts(), **{name: active})
    monkeypatch.undo()
    off = {"use_cache": True, "guidance_scale": 1.0, "num_beam_groups": 1, "diversity_penalty": 0.0}.get(name)
    assert same(ours(model, prompts(), **{name: off}), plain(model.lm, prompts()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_token": 3}, "unknown option 'max_new_token'; did you mean 'max_new_tokens'?"),
        ({"inputs": 3}, "unknown option 'inputs'"),
        ({"past_key_values": 3}, "unknown option 'past_key_values'"),
        ({"max_new_tokens": -1}, "`max_new_tokens` must be greater than 0"),
        ({"num_return_sequences": 2}, "`num_return_sequences`"),
        ({"num_beams": 2, "num_return_sequences": 3}, "`num_return_sequences` (3)"),
        ({"num_beams": 2, "streamer": object()}, "streamer: cannot be used with num_beams = 2"),
        ({"max_length": 5}, "max_length = 5: the instruction alone has 12 tokens"),
        ({"generation_config": {"num_beams": 2}}, "has to be a transformers.GenerationConfig"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "use_cache = False: cannot be used"),
    ],
)
def test_an_impossible_call_is_one_line(
    options: Options, message: str, model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(model, "prefill", None)
    with pytest.raises(UserError) as caught:
        model.generate(prompts(), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_callers_own_pieces_see_what_plain_transformers_shows_them(beams: int, model: AdaptedModel):
    class Record(LogitsProcessor):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.seen.append(input_ids.tolist())
            return scores.roll(int(input_ids[0, 3]) + 1, -1)

    class Stop(StoppingCriteria):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            self.seen.append(input_ids.tolist())
            return (input_ids % 7 == 0).sum(-1) > 3

    class Streamer(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.tolist())

        def end(self) -> None:
            self.seen.append("end")

    def run(call: Callable[..., Any]) -> tuple[Any, list[Any]]:
        record, stop, streamer, asked = Record(), Stop(), Streamer(), []

        def allowed(row: int, ids: Tensor) -> list[int]:
            asked.append((row, ids.tolist()))
            return [i for i in range(3, VOCABULARY) if (i + int(ids.sum())) % 3]

        pieces: dict[str, Any] = {"streamer": streamer} if beams == 1 else {"num_beams": beams}
        out = call(
            logits_processor=LogitsProcessorList([record]),
            stopping_criteria=StoppingCriteriaList([stop]),
            prefix_allowed_tokens_fn=allowed,
            synced_gpus=False,
            **pieces,
        )
        return out, [record.seen, stop.seen, streamer.seen, asked]

    expected, shown = run(lambda **o: plain(model.lm, prompts(), **o))
    found, seen = run(lambda **o: ours(model, prompts(), **o))
    assert torch.equal(found, expected)
    assert seen == shown
    assert not torch.equal(expected, plain(model.lm, prompts(), **({} if beams == 1 else {"num_beams": beams})))


@pytest.mark.parametrize(
    "case",
    [
        Case("zero_shot"),
        Case("prompt_tuning", {"num_soft_tokens": 3, "position": "before_instruction"}),
        Case("iapt", {"bottleneck": 8, "position": "after_instruction"}),
        Case("prefix_tuning", {"form": "keys_values", "reparameterization": "none"}),
        Case("lpt", {"generator": "naive", "bottleneck": 8}),
        Case("dept", {"num_soft_tokens": 3, "rank": 2, "max_offsets": 6}),
    ],
    ids=lambda c: c.method,
)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_with_soft_tokens_penalties_see_the_instruction_alone(case: Case, shape: str):
    """Against one whole pass a token without a cache, over one row."""
    model = build_model(case, shape)
    penalties = [RepetitionPenaltyLogitsProcessor(1.8), NoRepeatNGramLogitsProcessor(2)]
    expected = []
    for item in examples(ROWS):
        made = batch([item])
        seen = list(item.instruction)
        for _ in range(STEPS):
            made.response_ids = torch.tensor([[*seen[len(item.instruction) :], 0]])
            made.response_mask = torch.ones_like(made.response_ids, dtype=torch.bool)
            scores = model.engine.response_logits(made)[:, -1].detach()
            for penalty in penalties:
                scores = penalty(torch.tensor([seen]), scores)
            scores[0, [0, 2]] = -torch.inf
            seen.append(int(scores.argmax()))
        expected.append(seen[len(item.instruction) :])
    options = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "suppress_tokens": [0, 2]}
    alone = torch.cat([ours(model, batch([item]), **options) for item in examples(ROWS)])
    assert alone.tolist() == expected
    free = [ours(model, batch([item]), suppress_tokens=[0, 2]) for item in examples(ROWS)]
    assert not torch.equal(alone, torch.cat(free))
    # Old releases of transformers punish the pad token in a batch as well; here it is out of the question.
    assert torch.equal(ours(model, prompts(), **options), alone)


def test_a_generation_config_of_the_backbone_acts_only_where_it_is_given():
    model = AdaptedModel(build_backbone("llama"), None)
    expected, lm = ours(model, prompts()), model.lm
    own = GenerationConfig(repetition_penalty=5.0, num_beams=3, num_return_sequences=2, min_length=30, max_length=40)
    lm.generation_config = own
    lm.config.use_cache = False
    assert torch.equal(ours(model, prompts()), expected)
    assert lm.generation_config is own  # which is what others go on using
    given = ours(model, prompts(), generation_config=own, max_new_tokens=None, min_length=15)
    assert torch.equal(given, plain(lm, prompts(), max_new_tokens=None, min_length=15))
    assert given.shape == (2 * ROWS, 28)  # 40 with the instruction


def test_a_decoding_that_fails_leaves_the_backbone_as_it_was():
    model = AdaptedModel(build_backbone("llama"), None)
    own, hooks = model.lm.generation_config, len(model.lm._forward_pre_hooks)

    def fail(row: int, ids: Tensor) -> list[int]:
        raise RuntimeError("the caller's")

    with pytest.raises(RuntimeError, match="the caller's"):
        ours(model, prompts(), prefix_allowed_tokens_fn=fail)
    assert model.lm.generation_config is own
    assert len(model.lm._forward_pre_hooks) == hooks


def test_an_instruction_that_ends_in_the_pad_token_is_not_said_to_be_padded(caplog: pytest.LogCaptureFixture):
    model, shown = build_model(Case("prompt_tuning", {"num_soft_tokens": 3}), "llama"), prompts()
    shown.instruction_ids[:, -1] = 0
    ours(model, shown)
    assert "padding" not in caplog.text


def test_the_tokens_that_end_a_text():
    """The tokenizer's eos, and what the model declares if the tokenizer holds it to be special."""
    backbone = build_backbone("llama")
    lm, tokenizer = backbone.lm, backbone.tokenizer
    lm.generation_config.eos_token_id = None
    lm.config.eos_token_id = [9, 1]  # 9 is a word like any other
    assert end_tokens(lm, tokenizer) == [2, 1]
    lm.generation_config.eos_token_id = 9
    assert end_tokens(lm, tokenizer) == [2]
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    assert end_tokens(lm, tokenizer) == [2, 9]
    model = AdaptedModel(backbone, None)
    free = ours(model, prompts(1), eos_token_id=VOCABULARY - 1)[0].tolist()
    for token in (free[2], free[3]):
        tokenizer.add_special_tokens({"additional_special_tokens": [f"w{token}"]})
    lm.generation_config.eos_token_id = [free[3], free[2]]
    assert ours(model, prompts(1))[0].tolist() == free[: free.index(free[2]) + 1]


def test_without_a_tokenizer_the_lm_says_what_ends_a_text():
    lm = build_backbone("llama").lm
    lm.generation_config.eos_token_id = [2, 9]
    model = iapt.attach(lm, {"name": "prompt_tuning", "num_soft_tokens": 3, "init": "random"})
    assert end_tokens(lm, model.backbone.tokenizer) == [2, 9]
    with pytest.raises(UserError, match="stop_strings: cannot be found without the backbone's tokenizer"):
        model.generate(prompts(), stop_strings="w5")
    free = ours(model, prompts(1), eos_token_id=VOCABULARY - 1)[0].tolist()
    lm.generation_config.eos_token_id = [2, free[1]]
    assert ours(model, prompts(1))[0].tolist() == free[:2]
