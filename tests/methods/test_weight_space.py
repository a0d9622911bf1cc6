"""What is particular to adapters, BitFit and full fine-tuning; what holds for all methods is in tests/contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from iapt.config.errors import UserError
from iapt.methods.registry import METHODS
from iapt.model.adapted import AdaptedModel
from iapt.model.architecture import find_sublayers
from iapt.model.backbone import Backbone
from iapt.model.method import WeightMethod
from tests.contracts.conftest import SHAPES, Case, batch, build_backbone, build_model, examples

ADAPTERS = ("houlsby", "parallel_adapter")


def config_of(method: str, **options: Any) -> Any:
    return METHODS[method].config(name=method, **options)


def attach(method: str, backbone: Backbone, **options: Any) -> AdaptedModel:
    torch.manual_seed(11)
    return AdaptedModel(backbone, METHODS[method].build(config_of(method, **options), backbone))


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("parallel_adapter", {"bottleneck": 160}, 32 * 2 * 2 * 4096 * 160),  # 83.89M, "83.9M" in MiLoRA's table
        ("houlsby", {"bottleneck": 64, "sublayers": ["ffn"]}, 32 * (2 * 4096 * 64 + 64 + 4096)),
        ("bitfit", {}, 32 * (5 * 4096 + 2 * 11008)),  # 1.36M
        ("bitfit", {"create_missing": False}, 0),
        ("full", {}, 6_738_415_616),
    ],
)
def test_sizes_on_llama2_7b(llama2_7b: Backbone, method: str, options: dict[str, Any], expected: int):
    assert METHODS[method].count(config_of(method, **options), llama2_7b) == expected


# -- adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sublayer", ["attention", "ffn"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_stand_where_their_formula_says(method: str, sublayer: str, shape: str):
    """The first layer's sublayer with its adapter is compared with the formula over the bare sublayer."""
    backbone = build_backbone(shape)
    model = attach(method, backbone, bottleneck=6, sublayers=[sublayer])
    assert isinstance(model.method, WeightMethod)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += torch.randn_like(parameter) * 0.2
    seen: dict[str, torch.Tensor] = {}
    first, last = find_sublayers(backbone.layers[0])[sublayer]
    first.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    last.register_forward_hook(lambda m, args, out: seen.update(out=out[0] if isinstance(out, tuple) else out))
    ids = torch.tensor([[1, 5, 9, 4]])
    with torch.no_grad():
        backbone.lm(input_ids=ids)
        adapted = dict(seen)
        with model.disabled():
            backbone.lm(input_ids=ids)
    bare, weights = seen["out"], {name.split(".", 3)[3]: p for name, p in model.trainable().items() if ".0." in name}
    down, up = weights["down.weight"], weights["up.weight"]
    if method == "houlsby":
        inner = nn.functional.gelu(bare @ down.T + weights["down.bias"])
        expected = bare + inner @ up.T + weights["up.bias"]
    else:
        expected = bare + 4 * nn.functional.relu(seen["x"] @ down.T) @ up.T
    torch.testing.assert_close(adapted["x"], seen["x"])
    torch.testing.assert_close(adapted["out"], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_sublayers_are_the_ones_that_the_residual_sums(shape: str):
    """Silencing both leaves a layer with nothing but its residual stream."""
    backbone = build_backbone(shape)
    places = find_sublayers(backbone.layers[1])
    for _, last in places.values():
        last.register_forward_hook(
            lambda m, args, out: (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else out * 0
        )
    seen: list[torch.Tensor] = []
    backbone.layers[1].register_forward_hook(
        lambda m, args, kwargs, out: seen.extend([args[0] if args else kwargs["hidden_states"], out]), with_kwargs=True
    )
    backbone.lm(input_ids=torch.tensor([[1, 5, 9, 4]]))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_start_near_the_bare_backbone(method: str):
    model = attach(method, build_backbone("llama"))
    adapted = model.score(batch(examples()))
    with model.disabled():
        bare = model.score(batch(examples()))
    if method == "parallel_adapter":
        torch.testing.assert_close(adapted, bare, rtol=1e-4, atol=1e-4)
    else:
        assert 0 < (adapted - bare).abs().max() < 0.05
    assert all((p == 0).all() for name, p in model.trainable().items() if "bias" in name)


def test_adapters_know_which_sublayers_there_are():
    for bad in ([], ["mlp"], ["ffn", "ffn"]):
        (problem,) = config_of("houlsby", sublayers=bad).problems()
        assert problem.startswith(f"method.sublayers = {bad}: allowed are attention and ffn")
    assert not config_of("houlsby", sublayers=["ffn"]).problems()
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67}
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes))
    with pytest.raises(UserError, match="BloomBlock's attention sums with the residual itself"):
        attach("houlsby", Backbone("bloom", bloom, None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="found no attention sublayer in Linear"):
        find_sublayers(nn.Linear(2, 2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parallel_adapters_keep_no_activations(checkpointing: bool):
    """What is read ahead of the sublayer is dropped behind it, when layers are recomputed too."""
    case = Case("parallel_adapter", {"bottleneck": 6})
    model = build_model(case, "opt", activation_checkpointing=checkpointing).train()
    model.loss(batch(examples())).backward()
    hooks = [h for m in model.backbone.lm.modules() for h in m._forward_hooks.values()]
    kept = [a for hook in hooks for a in getattr(hook, "args", ()) if isinstance(a, list)]
    assert kept == [[]] * 6


# -- BitFit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["gpt2", "opt"])
def test_bitfit_equals_training_the_biases(shape: str):
    """On models that have all biases: three steps of AdamW on the deltas and on the biases end at one place."""
    fitted, direct = attach("bitfit", build_backbone(shape)), AdaptedModel(build_backbone(shape), None)
    biases = {name: p for name, p in direct.lm.named_parameters() if name.endswith(".bias")}
    assert len(biases) == len(fitted.trainable())
    for parameter in biases.values():
        parameter.requires_grad_(True)
    for model, parameters in ((fitted, fitted.trainable()), (direct, biases)):
        # The keys' bias cancels in the softmax: its gradient is rounding noise, which Adam would blow up.
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.0, eps=1e-3)
        for _ in range(3):
            model.loss(batch(examples())).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(fitted.score(batch(examples())), direct.score(batch(examples())), rtol=1e-4, atol=1e-4)
    original = dict(build_backbone(shape).lm.named_parameters())
    for name, bias in biases.items():
        delta = fitted.trainable()["deltas." + name.removesuffix(".bias").replace(".", "/")]
        torch.testing.assert_close(delta, bias - original[name], rtol=1e-3, atol=1e-4)


def test_bitfit_takes_existing_biases_or_makes_them():
    names = set(attach("bitfit", build_backbone("qwen2"), create_missing=False).trainable())
    assert names == {f"deltas.model/layers/{i}/self_attn/{p}_proj" for i in range(3) for p in "qkv"}
    made = set(attach("bitfit", build_backbone("qwen2")).trainable()) - names
    assert {name.rsplit("/", 1)[1] for name in made} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(UserError, match=r"method.create_missing = false: LlamaForCausalLM has no biases"):
        attach("bitfit", build_backbone("llama"), create_missing=False)


def test_bitfit_starts_as_the_bare_backbone():
    model = attach("bitfit", build_backbone("llama"))
    bare = AdaptedModel(build_backbone("llama"), None)
    # A map with a bias, though it is zero, is another kernel than one without.
    torch.testing.assert_close(model.score(batch(examples())), bare.score(batch(examples())), rtol=1e-4, atol=1e-4)


# -- full fine-tuning ---------------------------------------------------------------------------------------


def test_full_trains_tied_weights_once():
    model = attach("full", build_backbone("gpt2"))
    assert "transformer.wte.weight" in model.trainable()
    assert "lm_head.weight" not in model.trainable()
    assert model.lm.lm_head.weight is model.lm.transformer.wte.weight
    with model.disabled():
        assert model.lm.lm_head.weight is model.lm.transformer.wte.weight


def test_full_puts_a_bfloat16_backbone_back_bit_for_bit():
    options = {"dtype": torch.bfloat16, "precision": "bf16"}
    model = build_model(Case("full"), "gemma2", **options)
    bare = AdaptedModel(build_backbone("gemma2", torch.bfloat16), None, precision="bf16")
    made = batch(examples())
    model.loss(made).backward()
    before = model.adapter_state()
    with pytest.raises(RuntimeError, match="halfway"), model.disabled():  # noqa: PT012
        assert torch.equal(model.score(made), bare.score(made))
        assert {p.dtype for p in model.lm.parameters()} == {torch.bfloat16}
        for (name, parameter), original in zip(model.lm.named_parameters(), bare.lm.parameters(), strict=True):
            assert torch.equal(parameter, original), name
        raise RuntimeError("halfway")
    after = model.adapter_state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.dtype == torch.float32 and p.grad is not None for p in model.trainable().values())
    torch.optim.SGD(model.trainable().values(), lr=0.1).step()
    assert any(not torch.equal(before[name], p) for name, p in model.adapter_state().items())


def test_full_refuses_a_quantised_backbone():
    backbone = build_backbone("llama")
    backbone.lm.is_quantized = True
    with pytest.raises(UserError, match="backbone.quantization: .* allowed is none"):
        attach("full", backbone)
