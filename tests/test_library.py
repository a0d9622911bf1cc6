"""iapt inside one's own code: attach, save, load, generate as transformers users know it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import iapt
from iapt.config.errors import ConfigError, UserError
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import TINY_DIR
from iapt.runs import experiment
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples
from tests.test_experiment import config

README = Path(__file__).parent.parent / "README.md"
IAPT = {"name": "iapt", "bottleneck": 8}
PROMPT = {"name": "prompt_tuning", "num_soft_tokens": 3}
LORA = {"name": "lora", "kind": "peft", "type": "LORA", "options": {"r": 2}}
FULL_LENGTH = {"max_new_tokens": 4, "min_new_tokens": 4}


def attach(settings: dict[str, Any], shape: str = "llama", lm: Any = None, **options: Any) -> AdaptedModel:
    """On a random backbone, moved off its start so that nothing is a no-op by accident."""
    lm = lm or build_backbone(shape).lm
    torch.manual_seed(len(str(settings)))
    model = iapt.attach(lm, settings, **options)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += torch.randn_like(parameter) * 0.05
    return model


def test_a_method_by_name_is_the_shipped_one():
    from iapt.methods.settings import method_config

    lora = method_config({"name": "lora", "options": {"r": 4}})
    assert (lora.kind, lora.options["r"], lora.options["lora_alpha"]) == ("peft", 4, 16)  # type: ignore[attr-defined]
    assert method_config({"name": "iapt"}).learning_rate == 3e-3  # the YAML's, not the schema's
    assert method_config({"name": "mine", "kind": "iapt", "bottleneck": 8}).name == "mine"


def test_import_costs_nothing_and_knows_its_names():
    code = "import sys, iapt; assert 'torch' not in sys.modules; iapt.attach, iapt.load, iapt.make_batch; iapt.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("AttributeError: module 'iapt' has no attribute 'nothing'")


@pytest.mark.parametrize("settings", [IAPT, PROMPT, LORA], ids=lambda s: s["name"])
def test_attached_trained_saved_and_loaded(settings: dict[str, Any], tmp_path: Path):
    backbone = build_backbone("llama")
    lm = backbone.lm.train().requires_grad_(True)
    model = attach(settings, lm=lm, tokenizer=backbone.tokenizer)
    trained = model.trainable()
    assert {id(p) for p in lm.parameters() if p.requires_grad} <= {id(p) for p in trained.values()}
    assert not any(m.training for m in lm.modules())
    made = iapt.make_batch(backbone.tokenizer, ["w3 w4 w5", "w6 w7"], ["w8", "w9 w10"])
    before = model.loss(made).detach()
    model.train()
    optimizer = torch.optim.Adam(model.parameter_groups(1e-2))
    for _ in range(5):
        optimizer.zero_grad()
        model.loss(made).backward()
        optimizer.step()
    model.eval()
    assert model.loss(made) < before
    model.save(tmp_path / "a" / "b")
    fresh = build_backbone("llama")
    loaded = iapt.load(tmp_path / "a" / "b", backbone=fresh.lm, tokenizer=fresh.tokenizer)
    assert torch.equal(loaded.loss(made), model.loss(made))
    assert torch.equal(loaded.score(batch(examples())), model.score(batch(examples())))


def test_parameter_groups_keep_the_methods_own_rates():
    shared, own = attach(IAPT).parameter_groups(1e-2, weight_decay=0.1)
    assert (shared["lr"], shared["weight_decay"], len(shared["params"])) == (1e-2, 0.1, 3 * 3)
    assert (own["lr"], own["weight_decay"], len(own["params"])) == (1e-6, 0.0, 2 * 3)
    [everything] = attach(LORA).parameter_groups(1e-2)
    assert len(everything["params"]) == 2 * 7 * 3


def test_a_finished_run_loads_and_is_not_overwritten(tmp_path: Path):
    experiment.run(config("describe", zero_shot=False, backbone={"name": "tiny", "kind": "tiny"}), tmp_path)
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(TINY_DIR), AutoTokenizer.from_pretrained(TINY_DIR)
    model = iapt.load(tmp_path, backbone=lm, tokenizer=tokenizer)
    saved = json.loads((tmp_path / "adapter.json").read_text())
    assert model.meta == {key: saved[key] for key in ("method", "backbone", "trainable_params")} | {
        "backbone": {**saved["backbone"], "name": str(TINY_DIR)}
    }
    first = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    ids = tokenizer([first["instruction"]], return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=32)[0], skip_special_tokens=True)
    assert text.strip() == first["text"].strip()
    with pytest.raises(UserError, match="holds a finished run"):
        model.save(tmp_path)
    with pytest.raises(UserError, match=r"trained on backbone 'tiny'.*hidden_size is 32"):
        iapt.load(tmp_path, backbone=build_backbone("llama").lm)


def test_saving_needs_to_know_what_is_saved(tmp_path: Path):
    with pytest.raises(ValueError, match="built without meta"):
        build_model(Case("prompt_tuning"), "llama").save(tmp_path)
    (tmp_path / "adapter.json").write_text('{"schema_version": 1}')
    attach(PROMPT).save(tmp_path / "one")
    (tmp_path / "one" / "adapter.json").write_text('{"schema_version": 1}')
    with pytest.raises(UserError, match="does not say method.name"):
        iapt.load(tmp_path / "one", backbone=build_backbone("llama").lm)


def test_tensors_that_do_not_fit_leave_no_hooks(tmp_path: Path):
    attach(PROMPT).save(tmp_path)
    meta = json.loads((tmp_path / "adapter.json").read_text())
    meta["method"]["num_soft_tokens"] = 4
    (tmp_path / "adapter.json").write_text(json.dumps(meta))
    lm = build_backbone("llama").lm
    with pytest.raises(UserError, match="do not fit this method and backbone: prompt"):
        iapt.load(tmp_path, backbone=lm)
    assert not any(layer._forward_pre_hooks for layer in lm.model.layers)


def test_settings_are_checked_as_on_the_command_line():
    lm = build_backbone("llama").lm
    with pytest.raises(ConfigError) as caught:
        iapt.attach(lm, {"name": "iapt", "bottlenek": 8, "num_soft_tokens": 0, "position": "left"})
    assert [p.split(" = ")[0] for p in caught.value.problems] == [
        "method.bottlenek", "method.num_soft_tokens", "method.position",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"method.name = 'iatp': unknown method; did you mean 'iapt'"):
        iapt.attach(lm, {"name": "iatp"})
    with pytest.raises(ConfigError, match="numerator_degree"):  # a contradiction between two fields
        iapt.attach(lm, {"name": "iapt", "numerator_degree": 9})
    with pytest.raises(UserError, match="precision = 'fp16': allowed are fp32, bf16"):
        iapt.attach(lm, IAPT, precision="fp16")
    with pytest.raises(UserError, match="in_context.*use iapt-train"):
        iapt.attach(lm, {"name": "in_context"})
    from iapt.methods.iapt import IaptConfig

    assert iapt.attach(lm, IaptConfig(name="iapt", bottleneck=5)).method.generators[0].down.shape == (32, 5)
    with pytest.raises(ConfigError, match="method.bottleneck = 0: must be at least 1"):
        iapt.attach(lm, IaptConfig(name="iapt", bottleneck=0))


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_two_prompts_share_one_lm(shape: str):
    alone = [attach(s, shape).score(batch(examples())) for s in (IAPT, PROMPT)]
    lm = build_backbone(shape).lm
    first, second = (attach(s, lm=lm) for s in (IAPT, PROMPT))
    for _ in range(2):
        assert torch.equal(first.score(batch(examples())), alone[0])
        assert torch.equal(second.score(batch(examples())), alone[1])
    for model in (first, second):
        model.train()
        model.loss(batch(examples())).backward()
    ids = torch.tensor([[1, 5, 9, 4]])
    assert torch.equal(lm(input_ids=ids).logits, build_backbone(shape).lm(input_ids=ids).logits)
    first.detach()
    assert torch.equal(second.eval().score(batch(examples())), alone[1])


def test_after_checkpointed_training_eval_gives_the_lm_back():
    lm = build_backbone("llama").lm
    model, other = attach(PROMPT, lm=lm, activation_checkpointing=True), attach(IAPT, lm=lm)
    alone = other.score(batch(examples()))
    model.train()
    model.loss(batch(examples())).backward()
    model.eval()
    assert torch.equal(other.score(batch(examples())), alone)


@pytest.mark.parametrize("settings", [LORA, {"name": "houlsby"}, {"name": "full"}], ids=lambda s: s["name"])
def test_nothing_is_attached_beside_changed_weights(settings: dict[str, Any], tmp_path: Path):
    attach(PROMPT).save(tmp_path)
    lm = build_backbone("llama").lm
    model = attach(settings, lm=lm)
    for refused in (lm, copy.deepcopy(lm)):
        with pytest.raises(UserError, match=f"already carries the weights of method '{settings['name']}'.*fresh copy"):
            iapt.attach(refused, PROMPT)
    with pytest.raises(UserError, match="already carries"):
        iapt.load(tmp_path, backbone=lm)
    model.detach()
    with pytest.raises(UserError, match="already carries"):
        iapt.attach(lm, PROMPT)


def test_peft_models_are_told_from_bare_ones():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by a deprecated name
        wrapped = get_peft_model(build_backbone("llama").lm, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="wrapped by peft"):
        iapt.attach(wrapped, PROMPT)
    with pytest.raises(UserError, match="weights of method 'peft'"):
        iapt.attach(wrapped.base_model.model, PROMPT)
    assert iapt.attach(wrapped.unload(), PROMPT)


def test_without_a_tokenizer():
    lm = build_backbone("gpt2").lm  # has no pad token either
    assert iapt.attach(lm, IAPT).generate(batch(examples()), **FULL_LENGTH).shape == (5, 4)
    assert iapt.attach(lm, PROMPT).method.prompt.shape == (3, 32)
    with pytest.raises(UserError, match="tokenizer = None: this method needs"):
        iapt.attach(lm, {**PROMPT, "init": "text", "init_text": "w3 w4"})


def test_a_tokenizer_without_pad_gets_its_eos():
    backbone = build_backbone("gpt2")
    backbone.tokenizer.pad_token = None
    iapt.attach(backbone.lm, IAPT, tokenizer=backbone.tokenizer)
    assert backbone.tokenizer.pad_token == "</s>"
    backbone.tokenizer.pad_token = backbone.tokenizer.eos_token = None
    with pytest.raises(UserError, match="no pad, eos or unk token"):
        iapt.attach(backbone.lm, IAPT, tokenizer=backbone.tokenizer)


def test_precision_follows_the_lm():
    model = attach(IAPT, lm=build_backbone("llama", torch.bfloat16).lm).train()
    model.loss(batch(examples())).backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in model.trainable().values())
    assert model.engine.autocast == torch.bfloat16
    assert attach(IAPT).engine.autocast is None


@pytest.mark.parametrize(
    "settings", [IAPT, {**IAPT, "position": "after_instruction"}, LORA], ids=["iapt", "after", "lora"]
)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_generate_takes_ids_padded_anywhere(settings: dict[str, Any], shape: str):
    backbone = build_backbone(shape)
    model, made = attach(settings, lm=backbone.lm, tokenizer=backbone.tokenizer), batch(examples())
    expected = model.generate(made, **FULL_LENGTH)
    assert len({tuple(row) for row in expected.tolist()}) > 1
    left, mask = made.instruction_ids, made.instruction_mask
    gaps = (~mask).sum(1)
    right = torch.stack([row.roll(-int(gap)) for row, gap in zip(left, gaps, strict=True)])
    right_mask = torch.stack([row.roll(-int(gap)) for row, gap in zip(mask, gaps, strict=True)])
    assert not torch.equal(left, right)
    for ids, seen in ((left, mask), (left, mask.long()), (right, right_mask), (right, None), (left, None)):
        assert torch.equal(model.generate(input_ids=ids, attention_mask=seen, **FULL_LENGTH), expected)
    wide = torch.nn.functional.pad(right, (2, 3), value=9)  # the mask decides, not what stands there
    wide_mask = torch.nn.functional.pad(right_mask, (2, 3))
    assert torch.equal(model.generate(input_ids=wide, attention_mask=wide_mask, **FULL_LENGTH), expected)
    # With eos for a pad token nothing tells padding from text, so all of it is text.
    backbone.tokenizer.pad_token = backbone.tokenizer.eos_token
    ended = right.masked_fill(~right_mask, backbone.tokenizer.pad_token_id)
    whole = model.generate(input_ids=ended, attention_mask=torch.ones_like(ended), **FULL_LENGTH)
    assert torch.equal(model.generate(input_ids=ended, **FULL_LENGTH), whole)
    assert not torch.equal(whole, expected)


def test_generate_refuses_what_it_cannot_encode():
    model, ids = attach(IAPT), torch.tensor([[1, 5, 9]])
    for bad in ({}, {"batch": batch(examples()), "input_ids": ids}):
        with pytest.raises(UserError, match="either a batch or input_ids"):
            model.generate(**bad)
    for mask in (torch.tensor([[0, 0, 1]]), torch.ones(1, 2)):
        with pytest.raises(UserError, match="at least 2 tokens"):
            model.generate(input_ids=ids, attention_mask=mask)


def test_make_batch_tokenises_as_a_run_does():
    tokenizer = build_backbone("llama").tokenizer
    made = iapt.make_batch(tokenizer, ["w3 w4 w5", "w6 w7"], ["w8", "w9 w10"], choices=["w8", "w9"])
    assert made.instruction_ids.tolist() == [[3, 4, 5], [0, 6, 7]]
    assert made.response_ids.tolist() == [[8, 2, 0], [9, 10, 2]]
    assert made.choice_ids is not None
    assert made.choice_ids.tolist() == [[[8], [9]]] * 2
    bare = iapt.make_batch(tokenizer, ["w3 w4 w5", "w6 w7"])
    assert torch.equal(bare.instruction_ids, made.instruction_ids)
    assert bare.response_ids.shape == bare.response_mask.shape == (2, 0)
    assert bare.choice_ids is None
    model = attach(IAPT)
    assert torch.equal(model.generate(bare, **FULL_LENGTH), model.generate(made, **FULL_LENGTH))
    for instructions, responses in (([], None), (["w3 w4"], ["w5", "w6"])):
        with pytest.raises(UserError, match="one or more of both"):
            iapt.make_batch(tokenizer, instructions, responses)
    with pytest.raises(UserError, match="at least 2 tokens"):
        iapt.make_batch(tokenizer, ["w3"])


def test_the_readmes_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    block = re.search(r"^## As a library\n.*?^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert block is not None
    assert "PATH" in block.group(1)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"PATH": str(TINY_DIR)}
    exec(compile(block.group(1), "README.md", "exec"), scope)
    assert isinstance(scope["model"], AdaptedModel)
    assert (tmp_path / "my-adapter" / "adapter.safetensors").is_file()


def test_iapt_eval_says_why_it_cannot_score_a_folder_saved_from_python(tmp_path: Path):
    from iapt.runs.experiment import evaluate

    iapt.attach(build_backbone("llama").lm, {"name": "iapt", "bottleneck": 8}).save(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"saved from Python.*iapt\.load"):
        evaluate(tmp_path / "adapter", tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
