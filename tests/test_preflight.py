"""The preflight passes what is right, and names what is wrong: every check is shown to catch a break of its kind."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import iapt
from iapt import preflight
from iapt.config.errors import UserError
from iapt.config.schema import BackboneConfig
from iapt.methods.iapt import Iapt
from iapt.methods.prompt_tuning import PromptTuning
from iapt.methods.registry import METHODS
from iapt.methods.spt import Spt
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import Backbone, build_backbone
from iapt.model.cache import PassCache
from iapt.model.engine import Engine
from iapt.preflight import checks, known
from iapt.preflight.tools import distance, undisturbed
from iapt.runs import experiment
from tests.backbones import zoo
from tests.contracts import conftest
from tests.contracts.conftest import CASES, VARIANT_SHAPES, Case, batch, build_model, examples
from tests.test_experiment import config

PREFIX = Case("prefix_tuning", {"form": "keys_values", "reparameterization": "none"})
GATED = Case("iapt", {"bottleneck": 8, "output_start": "gated"})
PROMPT = Case("prompt_tuning")
LORA = Case("peft", {"type": "LORA"})
PARA = Case("para", {"bottleneck": 6})
SOME = [PREFIX, GATED, LORA, PARA]


def fresh(case: Case, shape: str, **options: Any) -> AdaptedModel:
    """The case at its start, as a run has it; `build_model` moves the tensors away from it."""
    backbone = conftest.build_backbone(shape, options.pop("dtype", torch.float32))
    spec = METHODS[case.method]
    torch.manual_seed(3)
    return AdaptedModel(backbone, spec.build(spec.config(name=case.method, **case.options), backbone), **options)


# -- what is right passes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", VARIANT_SHAPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_right_methods_pass(case: Case, shape: str):
    if shape in case.impossible:
        pytest.skip(case.impossible[shape])
    model = fresh(case, shape)
    figures = preflight.check(model, case.method)
    assert figures["status"] == "passed"
    assert max(figures[check] for check in checks.WHAT if check in figures and check != "moved") <= 1e-4
    trained = len(model.trainable())
    assert figures["tensors_with_gradient"] == trained
    assert ("moved" in figures) == bool(trained)
    assert trained == 0 or figures["moved"] >= checks.SHOWN


@pytest.mark.parametrize("case", SOME, ids=lambda c: c.method)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16, "precision": "bf16"},
        {"precision": "bf16"},
        {"dtype": torch.bfloat16},
        {"activation_checkpointing": True},
    ],
    ids=["bf16", "autocast", "bf16-weights", "checkpointing"],
)
def test_every_precision_and_checkpointing_pass(case: Case, options: dict[str, Any]):
    figures = preflight.check(fresh(case, "llama", **options), case.method)
    half = any(key in options for key in ("dtype", "precision"))
    assert figures["precision"] == ("bfloat16" if half else "float32")
    assert figures["tolerance"] < checks.COARSE


@pytest.mark.parametrize("shape", ["gemma2", "mistral", "opt", "qwen2"])
@pytest.mark.parametrize("case", SOME, ids=lambda c: c.method)
def test_other_shapes_pass(case: Case, shape: str):
    assert preflight.check(fresh(case, shape), case.method)["status"] == "passed"


@pytest.mark.parametrize("options", [{}, {"output_start": "gated"}, {"position": "before_instruction"}])
def test_a_flat_backbone_passes(options: dict[str, Any]):
    """On weights of the usual 0.02 an open gate hardly shows. The noise must not grow until softmaxes are flat."""
    parts = experiment.build(config(options=options), to_train=True)
    assert preflight.check(parts.model, "iapt")["tensors_with_gradient"] == len(parts.model.trainable())


@pytest.mark.parametrize("case", [PROMPT, *SOME], ids=lambda c: c.method)
def test_the_embedded_backbone_passes(case: Case):
    backbone = build_backbone(BackboneConfig())
    spec = METHODS[case.method]
    model = AdaptedModel(backbone, spec.build(spec.config(name=case.method, **case.options), backbone))
    assert preflight.check(model, case.method)["status"] == "passed"


def test_a_backbone_that_amplifies_rounding_is_given_more_room():
    """Some pretrained ones do: in bfloat16 right roads were 0.4 of the spread apart where soft tokens stand first."""
    figures = []
    for scale in (1.0, 40.0):
        model = fresh(PROMPT, "llama", dtype=torch.bfloat16)
        with torch.no_grad():
            for layer in model.backbone.layers:  # attention that is nearly a choice of one column
                layer.self_attn.q_proj.weight.mul_(scale)
        figures.append(preflight.check(model, "prompt_tuning"))
    plain, steep = figures
    assert steep["rounding"] > 3 * plain["rounding"]
    assert steep["tolerance"] == pytest.approx(max(0.05, checks.ROUNDINGS * steep["rounding"]), rel=0.01)
    assert ("small differences" in steep["skipped"]) == (steep["tolerance"] > checks.COARSE)


@pytest.mark.parametrize("case", [GATED, LORA, Case("full"), Case("panda", {"num_soft_tokens": 4})], ids=lambda c: c.id)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(case: Case, fails: bool, monkeypatch: pytest.MonkeyPatch):
    model = build_model(case, "llama").train()
    model.loss(batch(examples())).backward()
    for module in list(model.lm.modules())[::3]:
        module.training = True

    def state() -> dict[str, Any]:
        return {
            "values": {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
            "gradients": {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            "wanted": [n for n, p in model.named_parameters() if p.requires_grad],
            "modes": [module.training for module in model.modules()],
            "engine": (model.engine.training, model.engine.one_pass, model.engine.active, model.engine.hooks.recompute),
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
            "generation": model.lm.generation_config,
        }

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, np.ndarray):
            return np.array_equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return a is b or a == b

    def draw_and_fail(*args: Any, **kwargs: Any) -> None:
        torch.rand(3), random.random(), np.random.rand()
        raise ZeroDivisionError

    if fails:
        monkeypatch.setattr(AdaptedModel, "generate", draw_and_fail)
    before = state()
    assert before["gradients"]
    with pytest.raises(UserError, match="ZeroDivisionError") if fails else nullcontext():
        preflight.check(model, case.method)
    after = state()
    assert {key for key in before if not same(before[key], after[key])} == set()


def test_dropout_in_the_backbone_or_method_is_no_difference():
    model = fresh(Case("lpt", {"bottleneck": 8, "dropout": 0.9}), "gpt2").train()
    assert preflight.check(model, "lpt")["training"] <= 1e-4


def test_what_cannot_be_checked_is_said():
    assert set(preflight.check(fresh(Case("zero_shot"), "llama"), "zero_shot")["skipped"]) == {"moved", "gradients"}
    post = preflight.check(fresh(Case("post", {"num_soft_tokens": 4}), "llama"), "post")
    assert set(post["skipped"]) == {"objective"}  # its source is not there, nor asked for
    scored = preflight.check(fresh(PROMPT, "llama"), "prompt_tuning", gradients=False)
    assert scored["skipped"] == {"gradients": "nothing is trained here"}
    model = fresh(PROMPT, "llama")
    model.engine.one_pass = True
    assert set(preflight.check(model, "prompt_tuning")["skipped"]) == {"prefix"}
    long = preflight.check(fresh(Case("prompt_tuning", {"num_soft_tokens": 120}), "llama"), "prompt_tuning")
    assert long["status"] == "skipped"
    assert "the context has 128" in preflight.line(long)


def test_tensors_that_are_idle_by_design_are_no_failure():
    spt = fresh(Case("spt", {"bottleneck": 8}), "llama")
    assert isinstance(spt.method, Spt)
    spt.method.kept[1] = True  # as after its search, and as a restored adapter has it
    figures = preflight.check(spt, "spt")
    assert figures["tensors_with_gradient"] == 2
    assert set(figures["skipped"]) == {"idle tensors"}
    ipt = fresh(Case("ipt", {"num_soft_tokens": 2, "bottleneck": 8}), "llama")
    assert preflight.check(ipt, "ipt")["tensors_with_gradient"] == len(ipt.trainable()) - 1


def test_experts_without_a_token_are_no_failure_unless_all_are():
    probe = checks.Probe(fresh(PROMPT, "llama"), "bitfit", "", {})
    names = [f"layers.{layer}.mlp.experts.{expert}.up" for layer in (0, 1) for expert in (0, 1)]
    probe.trained = dict.fromkeys([*names, "layers.0.mlp.up"], nn.Parameter(torch.zeros(1)))
    left = {name: probe.trained[name] for name in (names[1], names[2], names[3], "layers.0.mlp.up")}
    assert set(probe._routed(left)) == {*names[2:], "layers.0.mlp.up"}
    assert set(probe.skipped) == {"experts"}


def test_the_distance_is_in_units_of_the_spread():
    torch.manual_seed(0)
    wanted, mask = torch.randn(2, 3, 500) * 7, torch.tensor([[True, True, False], [True, False, False]])
    assert distance(wanted + 3, wanted, mask) < 1e-6  # no prediction hangs on a constant
    found = wanted.clone()
    found[~mask] = torch.nan
    found[1, 0] += 0.7 * torch.randn(500)
    assert distance(found, wanted, mask) == pytest.approx(0.1, rel=0.15)
    found[0, 0, 5] = torch.nan
    assert distance(found, wanted, mask) != distance(found, wanted, mask)
    found = found.nan_to_num()
    found[..., :9] = wanted[..., :9] = torch.finfo(torch.float32).min  # tokens that no model may predict
    assert distance(found, wanted, mask) == pytest.approx(0.1, rel=0.15)


# -- what is wrong is caught by the check of that name --------------------------------------------------------

Break = Callable[[AdaptedModel, pytest.MonkeyPatch], None]


def on_decoder(change: Callable[[dict[str, Any]], None]) -> Break:
    """`change` edits the arguments of every pass over the decoder that has a mask: all but transformers' own."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("attention_mask") is not None:
            change(kwargs)
        return args, kwargs

    def harm(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
        model.backbone.decoder.register_forward_pre_hook(hook, with_kwargs=True)

    return harm


def count_padding(kwargs: dict[str, Any]) -> None:
    total, width = kwargs["attention_mask"].shape[1], kwargs["position_ids"].shape[1]
    kwargs["position_ids"] = torch.arange(total - width, total).expand_as(kwargs["position_ids"])


def see_padding(kwargs: dict[str, Any]) -> None:
    kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])


def feel_the_end(kwargs: dict[str, Any]) -> None:
    behind = (kwargs["attention_mask"].flip(1).cumsum(1) == 0).sum(1)
    if kwargs.get("inputs_embeds") is not None:
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"] * (1 + behind[:, None, None])


def blow_up(kwargs: dict[str, Any]) -> None:
    if kwargs.get("inputs_embeds") is not None:
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"] * torch.inf


def ignore_edits(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
    start = PassCache.__init__
    edit = lambda layer, keys, values: (keys, values)  # noqa: E731
    patch.setattr(PassCache, "__init__", lambda self, behind, given=None, keep=False: start(self, behind, edit, keep))


def use_the_prefix_up(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
    start = PassCache.__init__
    patch.setattr(PassCache, "__init__", lambda self, behind, edit=None, keep=False: start(self, behind, edit, True))


def detach_gates(model: AdaptedModel | None, patch: pytest.MonkeyPatch) -> None:
    def detached(self: Iapt, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Any:
        return keys, values * self.gates[layer].detach().tanh().to(values.dtype)

    patch.setattr(Iapt, "keys_values", detached)


def add_a_stray(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
    assert model.method is not None
    model.method.stray = nn.Parameter(torch.ones(3))


def answer_nothing(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PromptTuning, "input_embeddings", lambda self: None)


def stay_on(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AdaptedModel, "disabled", lambda self: nullcontext())


def after_prefill(change: Callable[[Any, Any], None]) -> Break:
    """`change` edits a prefilled prefix, given the batch it was made of."""

    def harm(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
        prefill = Engine.prefill

        def changed(self: Engine, made: Any) -> Any:
            prefix = prefill(self, made)
            change(prefix, made)
            return prefix

        patch.setattr(Engine, "prefill", changed)

    return harm


def repeat_the_wrong_token(prefix: Any, made: Any) -> None:
    prefix.last_ids = made.instruction_ids[:, -2:-1]


def drop_a_column(prefix: Any, made: Any) -> None:
    prefix.cache.crop(-1)
    prefix.mask = prefix.mask[:, :-1]


def forget_the_plan(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "continuing", lambda self, prefix: nullcontext())


def choose_another(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
    generate = AdaptedModel.generate
    patch.setattr(AdaptedModel, "generate", lambda self, made, **options: generate(self, made, **options) ^ 1)


def differ_in_training(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
    logits = Engine.response_logits
    patch.setattr(Engine, "response_logits", lambda self, made: logits(self, made).roll(int(self.training), 1))


def need_ids(model: AdaptedModel, patch: pytest.MonkeyPatch) -> None:
    """As models with further embeddings in every layer do, which nothing but ids can feed."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("input_ids") is not None and kwargs.get("attention_mask") is None:
            output.logits = output.logits + nn.functional.one_hot(kwargs["input_ids"], output.logits.shape[-1])
        return output

    model.lm.register_forward_hook(hook, with_kwargs=True)


PADDED_LEFT, PADDED_RIGHT = r"more padding on the left.*differ by", r"more padding on the right.*differ by"
CONTINUED, OFF = r"encoded and continued.*differ by", r"switched off.*differ by"
NO_GATE = r"\d+ of \d+ trained tensors get no gradient \(gates\)"
BREAKS: dict[str, tuple[Case, str, Break, str]] = {
    "positions count padding": (PROMPT, "gpt2", on_decoder(count_padding), PADDED_LEFT),
    "the mask ignores padding": (PROMPT, "llama", on_decoder(see_padding), PADDED_LEFT),
    "padding behind the response is felt": (PROMPT, "llama", on_decoder(feel_the_end), PADDED_RIGHT),
    "edits are ignored": (PREFIX, "llama", ignore_edits, "its 1 trained tensors reach nothing"),
    "edits by gates are ignored": (GATED, "llama", ignore_edits, NO_GATE),
    "a gate is detached": (GATED, "llama", detach_gates, NO_GATE),
    "a tensor nobody reads": (PROMPT, "llama", add_a_stray, r"1 of 2 trained tensors get no gradient \(stray\)"),
    "a prompt that is not written": (PROMPT, "llama", answer_nothing, "its 1 trained tensors reach nothing"),
    "off is on": (PROMPT, "gpt2", stay_on, OFF),
    "off is on, in weights": (LORA, "llama", stay_on, OFF),
    "embeddings are not enough": (PROMPT, "llama", need_ids, OFF),
    "another last token": (PROMPT, "llama", after_prefill(repeat_the_wrong_token), CONTINUED),
    "one column short": (PROMPT, "llama", after_prefill(drop_a_column), CONTINUED),
    "a prefix that is used up": (PROMPT, "llama", use_the_prefix_up, CONTINUED),
    "decoding without scales": (PARA, "llama", forget_the_plan, r"tokens decoded.*differ by"),
    "decoding another token": (PROMPT, "llama", choose_another, r"tokens decoded"),
    "training is another pass": (PROMPT, "llama", differ_in_training, r"the training pass.*differ by"),
    "no numbers": (PROMPT, "llama", on_decoder(blow_up), "are not finite"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_caught(name: str, monkeypatch: pytest.MonkeyPatch):
    case, shape, harm, said = BREAKS[name]
    model = fresh(case, shape)
    harm(model, monkeypatch)
    with pytest.raises(UserError, match=said) as caught:
        preflight.check(model, case.method)
    message = str(caught.value)
    assert "\n" not in message
    assert f"method {case.method} on model_type {shape}" in message
    assert message.endswith("preflight=off runs it without this check")


@pytest.mark.parametrize(
    "name", ["the mask ignores padding", "another last token", "off is on, in weights", "off is on"]
)
def test_a_break_is_caught_in_bfloat16_too(name: str, monkeypatch: pytest.MonkeyPatch):
    case, shape, harm, said = BREAKS[name]
    model = fresh(case, shape, dtype=torch.bfloat16, precision="bf16")
    harm(model, monkeypatch)
    with pytest.raises(UserError, match=said):
        preflight.check(model, case.method)


@pytest.mark.parametrize(("dtype", "spread"), [(torch.float32, 0.02), (torch.float32, 0.3), (torch.bfloat16, 0.3)])
def test_a_model_that_looks_ahead_is_caught(dtype: torch.dtype, spread: float):
    for looks_ahead in (False, True):
        lm = bert(spread, dtype, is_decoder=True)
        lm.config.is_decoder = not looks_ahead  # what its mask goes by, its layers stay a decoder's
        start = {"tokenizer": conftest.build_backbone("llama").tokenizer}
        expected = pytest.raises(UserError, match=r"ahead of a changed token.*differ by")
        with expected if looks_ahead else nullcontext():
            iapt.attach(lm, {"name": "bitfit"}, **start)


def test_an_encoder_is_refused_without_a_probe():
    lm, tokenizer = bert(0.02, torch.float32, is_decoder=False), conftest.build_backbone("llama").tokenizer
    with pytest.raises(UserError, match=r"BertLMHeadModel is built as an encoder.*is_decoder: true"):
        iapt.attach(lm, {"name": "prompt_tuning"}, tokenizer=tokenizer, preflight=False)


def test_attention_modules_that_are_replaced_on_the_way_are_refused():
    with pytest.raises(UserError, match=r"BigBirdForCausalLM replaces its attention modules.*original_full"):
        AdaptedModel(zoo.build("big_bird-sparse"), None)


def bert(spread: float, dtype: torch.dtype, is_decoder: bool) -> PreTrainedModel:
    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    made = AutoConfig.for_model("bert", **sizes, num_attention_heads=4, is_decoder=is_decoder, initializer_range=spread)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(made, dtype=dtype)


RAISED = [IndexError("list index out of range"), TypeError("a\nb"), AttributeError(), KeyError(1), ValueError("x")]


@pytest.mark.parametrize("error", RAISED, ids=lambda e: type(e).__name__)
def test_what_a_library_raises_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Engine, "extend", fail)
    with pytest.raises(UserError, match=rf"encoded and continued.*: ended in {type(error).__name__}") as caught:
        preflight.check(fresh(PROMPT, "llama"), "prompt_tuning")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), KeyboardInterrupt(), UserError("mine")], ids=repr)
def test_what_means_something_else_stays_what_it_is(error: BaseException, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Engine, "extend", fail)
    with pytest.raises(type(error)) as caught:
        preflight.check(fresh(PROMPT, "llama"), "prompt_tuning")
    assert caught.value is error


def test_the_message_names_what_works_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known, "VERIFIED", tmp_path / "verified.json")
    assert known.known_there("llama", "lora") == "no method was tested there"
    family = {"right": ["lora", "bitfit"], "refused": {"para": "no inner map"}}
    known.VERIFIED.write_text(json.dumps({"transformers": "5.0", "families": {"mpt": family}}))
    assert known.known_there("llama", "lora") == "no method was tested there"
    assert known.known_there("mpt", "iapt") == "known to be right there (transformers 5.0): lora, bitfit"
    assert "no inner map" in known.known_there("mpt", "para")


# -- where it runs --------------------------------------------------------------------------------------------


def test_a_run_and_its_evaluation_show_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = experiment.run(config(zero_shot=False), tmp_path / "on")
    assert json.loads((tmp_path / "on" / "summary.json").read_text())["preflight"] == summary.preflight
    assert summary.preflight["status"] == "passed"
    assert set(checks.WHAT) <= set(summary.preflight)
    assert len(re.findall(r"^preflight: passed in .*$", capsys.readouterr().out, re.MULTILINE)) == 1
    off = experiment.run(config(zero_shot=False, preflight="off"), tmp_path / "off")
    assert off.preflight == {"status": "off"}
    # It changes no result.
    assert off.metrics == summary.metrics
    for name in ("predictions.jsonl", "adapter.safetensors"):
        assert (tmp_path / "on" / name).read_bytes() == (tmp_path / "off" / name).read_bytes()
    again = experiment.evaluate(tmp_path / "off", tmp_path / "eval", {"preflight": "auto"})
    assert again.preflight["status"] == "passed"
    assert again.metrics["test"] == summary.metrics["test"]
    assert experiment.evaluate(tmp_path / "off", tmp_path / "eval2", {}).preflight == {"status": "off"}


def test_a_run_that_would_be_wrong_never_takes_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    detach_gates(None, monkeypatch)
    with pytest.raises(UserError, match=r"get no gradient \(gates\): method iapt on model_type llama"):
        experiment.run(config(options={"output_start": "gated"}, zero_shot=False), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_in_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lm = conftest.build_backbone("llama").lm
    model = iapt.attach(lm, {"name": "lpt"})
    assert model.preflight is not None
    assert model.preflight["status"] == "passed"
    model.save(tmp_path)
    model.detach()
    stay_on(model, monkeypatch)
    for start in (lambda **o: iapt.attach(lm, {"name": "lpt"}, **o), lambda **o: iapt.load(tmp_path, backbone=lm, **o)):
        with pytest.raises(UserError, match=r"switched off.*preflight=False runs it"):
            start()
        assert not any(layer._forward_pre_hooks for layer in lm.model.layers)
        unprobed = start(preflight=False)
        assert unprobed.preflight is None
        unprobed.detach()


def test_a_loaded_whole_backbone_is_not_asked_for_gradients(tmp_path: Path):
    asked = iapt.attach(conftest.build_backbone("llama").lm, {"name": "full"})
    asked.save(tmp_path)
    loaded = iapt.load(tmp_path, backbone=conftest.build_backbone("llama").lm)
    assert asked.preflight is not None
    assert loaded.preflight is not None
    assert asked.preflight["tensors_with_gradient"] == len(asked.trainable())
    assert loaded.preflight["skipped"] == {"gradients": "nothing is trained here"}


def test_a_start_from_the_global_generator_is_what_it_was():
    starts = []
    for probe in (True, False):
        torch.manual_seed(5)
        model = iapt.attach(conftest.build_backbone("llama").lm, {"name": "iapt", "bottleneck": 8}, preflight=probe)
        starts.append((model.adapter_state(), torch.rand(3)))
    assert torch.equal(starts[0][1], starts[1][1])
    assert all(torch.equal(tensor, starts[1][0][name]) for name, tensor in starts[0][0].items())


def test_the_rows_are_ordinary_tokens_and_no_two_alike():
    model = fresh(PROMPT, "llama")
    with undisturbed(model) as starts:
        probe = checks.Probe(model, "prompt_tuning", "", starts)
    rows = [
        *probe.batch.instruction_ids[probe.batch.instruction_mask],
        *probe.batch.response_ids[probe.batch.response_mask],
    ]
    assert len({int(i) for i in rows}) == len(rows) == 15
    assert not {int(i) for i in rows} & set(model.backbone.tokenizer.all_special_ids)
    assert isinstance(model.backbone, Backbone)
