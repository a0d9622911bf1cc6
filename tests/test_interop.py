"""Adapters to and from peft compute what they computed, held against peft itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import iapt
from iapt.config.errors import UserError
from iapt.model.adapted import AdaptedModel
from iapt.model.edits.layer_input import LayerInput
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples
from tests.test_library import IAPT, LORA, PROMPT, attach

P_TUNING = {"name": "p_tuning", "num_soft_tokens": 3, "encoder": "mlp"}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _quiet_peft():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks transformers by a deprecated name
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")  # it saves those that it adapts
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # GPT-2's linear map: peft settles it itself
        yield


def ours(model: AdaptedModel) -> list[torch.Tensor]:
    """(R, V) a row: the logits that predict its response, from one left-padded batch."""
    made = batch(examples())
    logits = model.eval().engine.response_logits(made).detach()
    return [row[: int(mask.sum())] for row, mask in zip(logits, made.response_mask, strict=True)]


def pefts(model: Any, soft_tokens: int, left: bool = False) -> list[torch.Tensor]:
    """The same by peft, from one batch padded on the right (or left) as a whole."""
    rows = [(*item.instruction, *item.response[:-1]) for item in examples()]
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, (gap, row) in enumerate(zip(gaps, rows, strict=True)):
        place = slice(gap, None) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits.detach()
    found = []
    for item, gap, row in zip(examples(), gaps, logits, strict=True):
        start = soft_tokens + left * gap + len(item.instruction) - 1
        found.append(row[start : start + len(item.response)])
    return found


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, **TOLERANCE) for x, y in zip(a, b, strict=True))


def move(parameters: Any) -> None:
    """Off their start, so that nothing is a no-op by accident."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.2


@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("settings", [PROMPT, P_TUNING], ids=lambda s: s["name"])
def test_prompts_go_to_peft(settings: dict[str, Any], shape: str, tmp_path: Path):
    model = attach(settings, shape)
    move(model.trainable().values())
    with pytest.warns(UserWarning, match="wrong results under left padding"):
        iapt.export_peft(model, tmp_path / "a" / "b")
    assert load_file(tmp_path / "a" / "b" / "adapter_model.safetensors")["prompt_embeddings"].shape == (3, 32)
    exported = peft.PeftModel.from_pretrained(build_backbone(shape).lm, str(tmp_path / "a" / "b"))
    assert same(ours(model), pefts(exported, 3))
    bare = AdaptedModel(build_backbone(shape), None)
    assert not same(ours(model), ours(bare))


def test_the_warning_is_true(tmp_path: Path):
    """Once this fails, peft has mended left padding and the warning can go."""
    model = attach(PROMPT)
    with pytest.warns(UserWarning, match="left padding"):
        iapt.export_peft(model, tmp_path)
    exported = peft.PeftModel.from_pretrained(build_backbone("llama").lm, str(tmp_path))
    assert not same(ours(model), pefts(exported, 0, left=True))


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig], ids=["prompt", "p_tuning"])
def test_prompts_come_from_peft(kind: Any, shape: str, tmp_path: Path):
    made = peft.get_peft_model(build_backbone(shape).lm, kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    move(made.parameters())
    made.save_pretrained(str(tmp_path))
    model = iapt.import_peft(tmp_path, backbone=build_backbone(shape).lm)
    assert same(ours(model), pefts(made, 4))
    model.save(tmp_path / "own")
    again = iapt.load(tmp_path / "own", backbone=build_backbone(shape).lm)
    assert same(ours(again), ours(model))


OPTIONS = [
    {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    {"r": 2, "use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
    {"rank_pattern": {"1.self_attn.q_proj": 2}, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2]},
]


@pytest.mark.parametrize(
    ("shape", "options"),
    [("llama", OPTIONS[0]), ("gpt2", OPTIONS[0]), ("llama", OPTIONS[1]), ("gpt2", OPTIONS[1]), ("llama", OPTIONS[2])],
    ids=["llama-plain", "gpt2-plain", "llama-dora", "gpt2-dora", "llama-patterns"],
)
def test_loras_go_to_peft_and_come_back(shape: str, options: dict[str, Any], tmp_path: Path):
    model = attach({**LORA, "options": options}, shape)
    move(model.trainable().values())
    iapt.export_peft(model, tmp_path)
    exported = peft.PeftModel.from_pretrained(build_backbone(shape).lm, str(tmp_path))
    assert same(ours(model), pefts(exported, 0))
    assert not same(ours(model), ours(AdaptedModel(build_backbone(shape), None)))
    back = iapt.import_peft(tmp_path, backbone=build_backbone(shape).lm)
    assert same(ours(back), ours(model))
    assert set(back.trainable()) == set(model.trainable())


_Q = {"r": 3, "target_modules": ["q_proj"]}
WHOLE_MODULES: dict[str, dict[str, Any]] = {
    "head": {**_Q, "modules_to_save": ["lm_head"]},
    "embeddings": {**_Q, "modules_to_save": ["embed_tokens"]},
    "both": {**_Q, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tied copies": {**_Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "lora on embeddings": {"r": 3, "target_modules": ["q_proj", "embed_tokens"]},
    "lora on both": {"r": 3, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tied lora": {"r": 3, "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied lora of rank 1": {"r": 1, "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "parameters": {**_Q, "target_parameters": ["mlp.up_proj.weight"]},
    "tokens": {**_Q, "trainable_token_indices": [3, 5]},
    "tokens of both": {**_Q, "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [4]}},
}


def llama(tied: bool) -> Any:
    """The llama shape, its head a matrix of its own or its embeddings."""
    config = build_backbone("llama").lm.config
    config.tie_word_embeddings = tied
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("options", WHOLE_MODULES.values(), ids=WHOLE_MODULES)
def test_copies_embeddings_and_tokens_go_to_peft_and_come_back(options: dict[str, Any], tied: bool, tmp_path: Path):
    model = iapt.attach(llama(tied), {**LORA, "options": options})
    start = ours(model)
    move(model.trainable().values())
    iapt.export_peft(model, tmp_path / "ours")
    exported = peft.PeftModel.from_pretrained(llama(tied), str(tmp_path / "ours"))
    assert not same(ours(model), start)
    assert same(ours(model), pefts(exported, 0))
    back = iapt.import_peft(tmp_path / "ours", backbone=llama(tied))
    assert same(ours(back), ours(model))
    assert set(back.trainable()) == set(model.trainable())
    # What peft writes holds more than is trained: embeddings beside a LoRA on them, say.
    exported.save_pretrained(str(tmp_path / "theirs"))
    assert same(ours(iapt.import_peft(tmp_path / "theirs", backbone=llama(tied))), ours(model))


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "dora", "patterns"])
def test_loras_come_from_peft(options: dict[str, Any], tmp_path: Path):
    made = peft.get_peft_model(build_backbone("llama").lm, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    move(made.parameters())
    made.save_pretrained(str(tmp_path))
    model = iapt.import_peft(tmp_path, backbone=build_backbone("llama").lm)
    assert same(ours(model), pefts(made, 0))
    model.save(tmp_path / "own")
    assert same(ours(iapt.load(tmp_path / "own", backbone=build_backbone("llama").lm)), ours(model))


@pytest.mark.parametrize(
    "settings",
    [
        IAPT,
        {**PROMPT, "position": "after_instruction"},
        {"name": "lpt", "num_soft_tokens": 3},
        {"name": "dept", "num_soft_tokens": 3},
        {"name": "adept", "num_soft_tokens": 3},
        {"name": "ept", "num_soft_tokens": 3},
        {"name": "para"},
        {"name": "bitfit"},
        {"name": "ia3", "kind": "peft", "type": "IA3"},
        {**LORA, "options": {"r": 2, "init_lora_weights": "pissa"}},
    ],
    ids=lambda s: s["name"],
)
def test_what_peft_cannot_hold_is_refused(settings: dict[str, Any], tmp_path: Path):
    with pytest.raises(UserError, match="does not fit; what peft can hold"):
        iapt.export_peft(attach(settings), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_prompt_with_a_head_of_its_own_is_refused(tmp_path: Path):
    backbone = build_backbone("llama")
    model = iapt.attach(backbone.lm, {"name": "ptec", "label_words": ["w5", "w6"]}, tokenizer=backbone.tokenizer)
    with pytest.raises(UserError, match="Ptec does not fit; what peft can hold"):
        iapt.export_peft(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_bare_backbone_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="the bare backbone does not fit"):
        iapt.export_peft(AdaptedModel(build_backbone("llama"), None), tmp_path)


def test_prompts_that_also_act_on_layers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = build_model(Case("prompt_tuning"), "llama")
    monkeypatch.setattr(model.method, "edits", lambda: (LayerInput(model.method, reads="nothing"),))
    with pytest.raises(UserError, match="PromptTuning does not fit"):
        iapt.export_peft(model, tmp_path)


def test_exports_are_in_eval_mode_and_training_goes_on(tmp_path: Path):
    model = attach(LORA).train()
    iapt.export_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True
    assert model.lm.peft_config["default"].inference_mode is False
    assert all(p.requires_grad for p in model.trainable().values())


def test_imports_refuse_what_they_cannot_read(tmp_path: Path):
    lm = build_backbone("llama").lm
    with pytest.raises(UserError, match=r"expected adapter_config.json"):
        iapt.import_peft(tmp_path / "nowhere", backbone=lm)
    made = peft.get_peft_model(build_backbone("llama").lm, peft.IA3Config(task_type="CAUSAL_LM"))
    made.save_pretrained(str(tmp_path / "ia3"))
    with pytest.raises(UserError, match="peft_type = IA3; allowed are PROMPT_TUNING, P_TUNING and LORA"):
        iapt.import_peft(tmp_path / "ia3", backbone=lm)
    prompt = tmp_path / "prompt"
    with pytest.warns(UserWarning, match="left padding"):
        iapt.export_peft(attach(PROMPT), prompt)
    save_file({"prompt_embeddings": torch.zeros(3, 31)}, prompt / "adapter_model.safetensors")
    with pytest.raises(UserError, match="do not fit this method and backbone: prompt"):
        iapt.import_peft(prompt, backbone=lm)
    assert not any(layer._forward_pre_hooks for layer in lm.model.layers)
    save_file({"other": torch.zeros(3, 32)}, prompt / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds no prompt_embeddings"):
        iapt.import_peft(prompt, backbone=lm)
    (prompt / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        iapt.import_peft(prompt, backbone=lm)


def test_unconverted_pissa_is_refused(tmp_path: Path):
    made = peft.get_peft_model(
        build_backbone("llama").lm,
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="pissa"),
    )
    made.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="init_lora_weights = 'pissa' changes the backbone's weights too"):
        iapt.import_peft(tmp_path, backbone=build_backbone("llama").lm)


def test_options_that_act_in_pefts_forward_pass_are_refused(tmp_path: Path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3, 4])
    peft.get_peft_model(build_backbone("llama").lm, config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"alora_invocation_tokens = \[3, 4\]: not supported.*PeftModel.forward"):
        iapt.import_peft(tmp_path, backbone=build_backbone("llama").lm)
