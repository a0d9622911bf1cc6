"""What is particular to the methods that come from peft; what holds for every method is in tests/contracts."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hydra import compose, initialize_config_dir
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from iapt.config.errors import ConfigError, UserError
from iapt.config.paths import CONFIG_DIR
from iapt.config.schema import TrainerConfig
from iapt.data.batch import Batch
from iapt.methods.peft.method import AdaLora, PeftConfig
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import Backbone
from iapt.training.tracking import Tracker
from iapt.training.trainer import Trainer
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples

LINEARS = 3 * 7  # adapted linear maps of the llama shape


def configured(kind: str, **options: Any) -> PeftConfig:
    return PeftConfig(name="any", kind="peft", type=kind, options=options)


def adapted(
    kind: str, shape: str = "llama", seed: int = 11, dtype: torch.dtype = torch.float32, **options: Any
) -> AdaptedModel:
    """As built, trained tensors at their start."""
    backbone = build_backbone(shape, dtype)
    torch.manual_seed(seed)
    return AdaptedModel(backbone, METHODS["peft"].build(configured(kind, **options), backbone))


def moved(model: AdaptedModel, size: float = 0.1) -> AdaptedModel:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def twin(model: AdaptedModel, config: Any) -> nn.Module:
    """peft's own model around the same backbone with the same trained tensors."""
    torch.manual_seed(11)
    with warnings.catch_warnings():  # peft asks transformers by a deprecated name
        warnings.simplefilter("ignore")
        theirs = get_peft_model(build_backbone("llama").lm, config).eval()
    ours, copied = model.trainable(), 0
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours[name.removeprefix("base_model.model.").replace(".default", "")])
                copied += 1
    assert copied == len(ours)
    return theirs


def right_padded(made: Batch) -> dict[str, torch.Tensor]:
    """The batch as transformers' models are usually fed: padding behind, labels on the response alone."""
    rows, width = [], made.instruction_ids.shape[1] + made.response_ids.shape[1]
    for i, im, r, rm in zip(
        made.instruction_ids, made.instruction_mask, made.response_ids, made.response_mask, strict=True
    ):
        ids, labels = torch.cat([i[im], r[rm]]), torch.cat([torch.full_like(i[im], -100), r[rm]])
        rest = width - len(ids)
        pad = nn.functional.pad
        rows.append((pad(ids, (0, rest)), pad(torch.ones_like(ids), (0, rest)), pad(labels, (0, rest), value=-100)))
    ids, mask, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_lora_is_pefts_own(init: Any):
    """With PiSSA and OLoRA peft's own model runs on changed weights, ours on the backbone's: one function."""
    options = {"r": 4, "lora_alpha": 12, "init_lora_weights": init}
    model, made = moved(adapted("LORA", **options)), batch(examples())
    theirs = twin(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options))
    torch.testing.assert_close(model.loss(made), theirs(**right_padded(made)).loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_taken_from_the_weights_is_saved(init: str):
    model, made = adapted("LORA", init_lora_weights=init), batch(examples())
    bare = AdaptedModel(build_backbone("llama"), None)
    torch.testing.assert_close(model.score(made), bare.score(made), rtol=1e-4, atol=1e-4)
    for (name, weight), expected in zip(
        ((n, p) for n, p in model.lm.named_parameters() if "lora_" not in n), bare.lm.parameters(), strict=True
    ):
        assert torch.equal(weight, expected), name
    moved(model)
    # Another machine's decomposition may round, or sign, its directions differently.
    other = adapted("LORA", init_lora_weights=init)
    with torch.no_grad():
        for buffer in other.method.buffers():
            buffer.mul_(-1.01)
    other.load_adapter_state(model.adapter_state())
    assert torch.equal(other.score(made), model.score(made))
    assert not any(p is b for p in model.trainable().values() for b in model.method.buffers())


def adalora(total: int, **options: Any) -> AdaptedModel:
    model = adapted("ADALORA", **options)
    assert isinstance(model.method, AdaLora)
    model.method.on_train_start(total)
    return model


def train(model: AdaptedModel, first: int, last: int) -> None:
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.05)
    model.train()
    for step in range(first, last + 1):
        loss = model.loss(batch(examples(seed=step)))
        penalty = model.method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        model.method.after_step(step)
        optimizer.zero_grad()


def ranks(model: AdaptedModel) -> list[int]:
    return [int((p != 0).sum()) for name, p in model.trainable().items() if "lora_E" in name]


def test_adalora_prunes_to_the_budget():
    model = adalora(20, init_r=6, target_r=2)
    train(model, 1, 2)  # tinit: a tenth of the run
    assert sum(ranks(model)) == 6 * LINEARS
    train(model, 3, 9)
    assert 2 * LINEARS < sum(ranks(model)) < 6 * LINEARS
    train(model, 10, 20)  # the last fifth only keeps what is pruned at zero
    assert sum(ranks(model)) == 2 * LINEARS
    assert len(set(ranks(model))) > 1  # allocated where it matters, not evenly


def test_adalora_penalty_is_pefts_own():
    model, fed = moved(adapted("ADALORA", init_r=4)), right_padded(batch(examples()))

    def loss(weight: float) -> torch.Tensor:
        config = AdaLoraConfig(
            init_r=4,
            target_r=2,
            target_modules="all-linear",
            orth_reg_weight=weight,
            total_step=10,
            task_type="CAUSAL_LM",
        )
        return twin(model, config)(**fed).loss

    penalty = model.method.penalty()
    torch.testing.assert_close(penalty, loss(0.5) - loss(0.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.loss(batch(examples())), loss(0.0), rtol=1e-4, atol=1e-4)
    penalty.backward()
    assert all((p.grad is not None) == ("lora_E" not in name) for name, p in model.trainable().items())


@pytest.mark.parametrize("stop", [7, 18])  # while pruning, and when only the pattern is left to keep
def test_adalora_resumes_where_it_stopped(stop: int):
    whole = adalora(20, init_r=6, target_r=2)
    train(whole, 1, stop)
    kept = io.BytesIO()
    torch.save({"adapter": whole.adapter_state(), "method": whole.method.training_state()}, kept)
    train(whole, stop + 1, 20)
    kept.seek(0)
    state = torch.load(kept, weights_only=True)
    resumed = adalora(20, init_r=6, target_r=2)
    resumed.load_adapter_state(state["adapter"])
    resumed.method.load_training_state(state["method"])
    train(resumed, stop + 1, 20)
    assert ranks(resumed) == ranks(whole)
    for name, parameter in whole.trainable().items():
        assert torch.equal(parameter, resumed.trainable()[name]), name


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_adalora_trains_for_any_number_of_steps(total: int):
    model = adalora(total, init_r=3)
    train(model, 1, total)
    assert sum(ranks(model)) == (2 if total > 1 else 3) * LINEARS


def test_adalora_keeps_what_is_pruned(tmp_path: Path):
    method = adalora(20, init_r=6, target_r=2).method
    assert [step for step in range(21) if method.can_be_checkpoint(step)] == [0, 16, 17, 18, 19, 20]
    case = Case("peft", {"type": "ADALORA", "options": {"init_r": 6, "target_r": 2}})
    config = TrainerConfig(max_steps=20, batch_size=8, eval_every=1, learning_rate=5e-3)
    accelerator = Accelerator(cpu=True)
    trainer = Trainer(
        build_model(case, "llama"), config, accelerator, examples(22), examples(9, seed=8),
        seed=1, folder=tmp_path, tracker=Tracker(tmp_path, accelerator, "test"),
    )  # fmt: skip
    assert trainer.run().best_step >= 16
    assert sum(ranks(trainer.model)) == 2 * LINEARS


def test_adalora_refuses_a_schedule_without_pruning():
    with pytest.raises(UserError, match=r"method.options.tinit = 6, method.options.tfinal = 4.*10 steps"):
        adalora(10, tinit=6, tfinal=4)
    adalora(11, tinit=6, tfinal=4)


def test_dropout_is_the_adapters_alone():
    model = adapted("LORA", "gpt2", lora_dropout=0.3)
    drops = {n: m for n, m in model.lm.named_modules() if isinstance(m, nn.Dropout)}
    assert {"lora_dropout" in name for name in drops} == {True, False}
    assert not any(m.training for m in drops.values())
    model.train()
    assert all(m.training == ("lora_dropout" in name) for name, m in drops.items())
    model.train(False)
    assert not any(m.training for m in drops.values())


@pytest.mark.parametrize("kind", ["LORA", "ADALORA", "VERA", "IA3", "LN_TUNING", "ADAPTION_PROMPT"])
def test_adapters_are_float32_whatever_the_backbone(kind: str):
    """In bfloat16 without autocast too, the residual stream keeps its dtype."""
    model = adapted(kind, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model.trainable().values())
    assert not any(".default" in name for name in model.trainable())
    seen: list[torch.dtype] = []
    model.backbone.layers[-1].register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    model.train()
    model.loss(batch(examples())).backward()
    assert seen == [torch.bfloat16]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable().values())


@pytest.mark.parametrize("shape", ["llama", "gpt2", "opt", "gemma2"])
def test_default_targets_are_found_by_what_they_are(shape: str):
    norms = {name for name, m in build_backbone(shape).lm.named_modules() if "Norm" in type(m).__name__}
    assert {name.split(".ln_tuning_layers")[0] for name in adapted("LN_TUNING", shape).trainable()} == norms
    scaled = {name.split(".ia3_l")[0].rsplit(".", 1)[-1] for name in adapted("IA3", shape).trainable()}
    expected = {"gpt2": {"c_attn", "c_proj"}, "opt": {"k_proj", "v_proj", "fc2"}}
    assert scaled == expected.get(shape, {"k_proj", "v_proj", "down_proj"})


def test_a_further_type_needs_no_code(tmp_path: Path):
    """LoHa, from a YAML file of a user's own."""
    (tmp_path / "method").mkdir()
    text = "name: loha\nkind: peft\ntype: LOHA\nlearning_rate: 1e-3\noptions: {r: 2, alpha: 4}\n"
    (tmp_path / "method" / "loha.yaml").write_text(text)
    overrides = [f"hydra.searchpath=[file://{tmp_path}]", "method=loha", "method.options.r=3"]
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        config = load_config(compose("train", overrides=overrides))
    assert config.method.options == {"r": 3, "alpha": 4}
    backbone = build_backbone("llama")
    made, method = batch(examples()), METHODS["peft"].build(config.method, backbone)
    model = AdaptedModel(backbone, method)
    bare = model.score(made)
    train(model, 1, 3)
    assert not torch.equal(model.score(made), bare)
    with model.disabled():
        # Taken with the adapter on, at its start: a weight with a zero product added.
        torch.testing.assert_close(model.score(made), bare, rtol=1e-4, atol=1e-4)
    counted = sum(p.numel() for p in model.trainable().values())
    assert METHODS["peft"].count(config.method, build_backbone("llama")) == counted
    assert config.method.size_knob().field == "options.r"


@pytest.mark.parametrize("kind", ["UNILORA", "FROD"])  # FRoD needs weights to compute with
def test_types_without_a_formula_are_counted_on_a_copy(kind: str):
    config, backbone = configured(kind), build_backbone("llama")
    torch.manual_seed(3)
    counted = METHODS["peft"].count(config, backbone)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))  # the copy's weights cost the run no random numbers
    assert counted == sum(p.numel() for p in adapted(kind).trainable().values())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (configured("LORA", r=8, target_modules=["q_proj", "v_proj"]), 4_194_304),  # "4.2M"
        (configured("LORA", r=32, use_dora=True), 79_953_920 + 32 * (5 * 4096 + 2 * 11008)),
        (configured("LORA", r=8, rank_pattern={"q_proj": 16}), 19_988_480 + 32 * 8 * 2 * 4096),  # on a copy
        (configured("ADALORA", init_r=64), 159_907_840 + 64 * 7 * 32),
        (configured("VERA", r=256, target_modules=["q_proj", "v_proj"]), 32 * 2 * (256 + 4096)),
        (configured("IA3"), 32 * (2 * 4096 + 11008)),  # "0.61M"
        (configured("LN_TUNING"), 65 * 4096),
        (configured("ADAPTION_PROMPT", adapter_layers=30), 30 * (10 * 4096 + 1)),  # "1.2M"
    ],
)
def test_sizes_on_llama2_7b(llama2_7b: Backbone, config: PeftConfig, expected: int):
    assert METHODS["peft"].count(config, llama2_7b) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "LORRA"}, ["method.type = 'LORRA': unknown type", "did you mean 'LORA'?", "VERA"]),
        ({"type": "lora"}, ["did you mean 'LORA'?"]),
        ({"type": "PREFIX_TUNING"}, ["method.type = PREFIX_TUNING", "methods of their own"]),
        ({"type": "LILY"}, ["method.type = LILY", "cached decoding"]),
        ({"type": "LORA", "options": {"lora_alfa": 3}}, ["method.options.lora_alfa = 3", "did you mean 'lora_alpha'?"]),
        ({"type": "ADALORA", "options": {"r": 3}}, ["method.options.r = 3: unknown option of ADALORA"]),
        ({"type": "ADALORA", "options": {"init_r": 4, "target_r": 4}}, ["method.options.target_r = 4", "init_r = 4"]),
        ({"type": "LORA", "options": {"init_lora_weights": "eva"}}, ["init_lora_weights = eva: allowed are", "pissa"]),
        ({"type": "LORA", "options": {"init_lora_weights": "pissa", "use_dora": True}}, ["use_dora = true"]),
        ({"type": "LORA", "options": {"layers_pattern": "h"}}, ["method.options = ", "layers_to_transform"]),
        ({"type": "LORA", "size": "rank"}, ["method.size = 'rank'", "did you mean"]),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], said: list[str]):
    config = PeftConfig(name="any", **settings)
    problems = config.problems()
    assert len(problems) == 1
    assert all(part in problems[0] for part in said), problems[0]
    with pytest.raises(ConfigError):
        METHODS["peft"].build(config, build_backbone("llama"))


def test_what_only_the_backbone_shows_is_a_user_error():
    with pytest.raises(UserError, match=r"ADAPTION_PROMPT.*'opt'"):
        adapted("ADAPTION_PROMPT", "opt")
    with pytest.raises(UserError, match=r"ADAPTION_PROMPT.*adapter layers '4'"):
        adapted("ADAPTION_PROMPT", adapter_layers=4)
    with pytest.raises(UserError, match="the backbone's own .*bias"):
        adapted("LORA", "gpt2", bias="all")


def test_the_budget_knob_is_the_rank_unless_told():
    knobs = {"LORA": "r", "ADALORA": "init_r", "VERA": "r", "ADAPTION_PROMPT": "adapter_len"}
    for kind, option in knobs.items():
        assert configured(kind).size_knob().field == f"options.{option}"
    assert configured("IA3").size_knob() is None
    assert configured("LN_TUNING").size_knob() is None
    told = PeftConfig(name="any", type="BOFT", size="boft_block_size")
    assert told.size_knob().field == "options.boft_block_size"
