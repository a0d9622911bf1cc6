"""P-tuning, prefix tuning and late prompt tuning: what is particular to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iapt.config.errors import ConfigError, UserError
from iapt.config.method import MethodConfig
from iapt.config.schema import Config
from iapt.methods.lpt import LptConfig
from iapt.methods.p_tuning import PTuningConfig
from iapt.methods.prefix_tuning import PrefixTuningConfig, key_value_heads
from iapt.methods.registry import METHODS, spec_of
from iapt.methods.settings import load_config
from iapt.model.adapted import AdaptedModel
from tests.backbones import zoo
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # 160 soft tokens of width 4096 at each of 32 layers
        (PrefixTuningConfig(num_soft_tokens=160, form="states", reparameterization="none"), 20.97e6),
        # 16 raw keys and values a layer
        (PrefixTuningConfig(num_soft_tokens=16, reparameterization="none"), 4.19e6),
        # 640 -> 4096 a layer: "84.5M" in MiLoRA's table
        (PrefixTuningConfig(num_soft_tokens=16, form="states", reparameterization="projected", low_dim=640), 84.5e6),
        # 5 tokens, bottleneck 128
        (LptConfig(bottleneck=128), 3.17e6),
        (LptConfig(bottleneck=128, generator="pooling"), 1.05e6),
    ],
    ids=["p_tuning_v2", "keys_values", "projected", "lpt-naive", "lpt-pooling"],
)
def test_sizes_on_llama2_7b(llama2_7b, config: MethodConfig, expected: float):
    config.name = "lpt" if isinstance(config, LptConfig) else "prefix_tuning"
    assert spec_of(config).count(config, llama2_7b) == pytest.approx(expected, rel=4e-3)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("width", [None, 6])
def test_p_tunings_count(encoder: str, width: int | None):
    config, backbone = PTuningConfig(num_soft_tokens=3, encoder=encoder, encoder_width=width), build_backbone("llama")
    method = METHODS["p_tuning"].build(config, backbone)
    assert sum(p.numel() for p in method.parameters()) == METHODS["p_tuning"].count(config, backbone)
    assert method.input_embeddings().shape == (3, 32)


@pytest.mark.parametrize("form", ["keys_values", "states"])
@pytest.mark.parametrize("reparameterization", ["none", "mlp", "projected"])
@pytest.mark.parametrize("shape", ["gemma2", "gpt2"])
def test_prefix_tunings_count_and_shapes(form: str, reparameterization: str, shape: str):
    config, backbone = PrefixTuningConfig(form=form, reparameterization=reparameterization), build_backbone(shape)
    method = METHODS["prefix_tuning"].build(config, backbone)
    assert sum(p.numel() for p in method.parameters()) == METHODS["prefix_tuning"].count(config, backbone)
    heads = 2 if shape == "gemma2" else 4
    assert key_value_heads(backbone) == (heads, 8)
    blank, state = torch.zeros(5, heads, 10, 8), torch.zeros(5, 10, 32)
    answers = method.keys_values(1, blank, blank) if form == "keys_values" else (method(1, state, None, state),)
    assert [a.shape for a in answers] == ([blank.shape] * 2 if form == "keys_values" else [state.shape])
    # A layer's soft tokens are its own.
    other = method.keys_values(2, blank, blank) if form == "keys_values" else (method(2, state, None, state),)
    assert not any(torch.equal(a, b) for a, b in zip(answers, other, strict=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("falcon", (1, 8)), ("falcon-groups", (4, 8)), ("gpt_bigcode", (1, 8)), ("mpt", (4, 8)), ("bloom", (4, 8))],
)
def test_heads_are_read_off_a_pass_where_configs_do_not_say(name: str, expected: tuple[int, int]):
    assert key_value_heads(zoo.build(name)) == expected


def test_an_explicit_head_width_is_read():
    assert key_value_heads(build_backbone("gemma2", head_dim=24)) == (2, 24)


@pytest.mark.parametrize("name", ["mamba2", "deepseek_v3", "gemma4_text"])
def test_layers_without_keys_and_values_of_one_shape_are_refused(name: str):
    with pytest.raises(UserError):
        METHODS["prefix_tuning"].build(PrefixTuningConfig(), zoo.build(name))


@pytest.mark.parametrize(("reparameterization", "std"), [("none", 0.5), ("projected", 0.5)])
def test_prefix_tuning_starts_at_init_std(reparameterization: str, std: float):
    config = PrefixTuningConfig(
        num_soft_tokens=200, form="states", reparameterization=reparameterization, low_dim=64, init_std=std
    )
    method = METHODS["prefix_tuning"].build(config, build_backbone("llama"))
    assert float(method.source(1).detach().std()) == pytest.approx(std, rel=0.1)


def test_the_size_knob_follows_the_form():
    def knob(config: MethodConfig) -> str | None:
        found = config.size_knob()
        return found and found.field

    assert knob(PTuningConfig()) == "encoder_width"
    assert knob(PrefixTuningConfig()) == "mlp_width"
    assert knob(PrefixTuningConfig(reparameterization="none")) == "num_soft_tokens"
    assert knob(PrefixTuningConfig(reparameterization="projected")) == "low_dim"
    assert knob(LptConfig()) == "bottleneck"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "p_tuning", "encoder": "gru"}, "method.encoder = 'gru': allowed are mlp, lstm"),
        ({"name": "prefix_tuning", "form": "kv"}, "method.form = 'kv': allowed are keys_values, states"),
        ({"name": "lpt", "layer": -1}, "method.layer = -1: must be at least 0"),
    ],
)
def test_bad_settings_are_named(settings: dict, said: str):
    with pytest.raises(ConfigError) as caught:
        load_config({"method": settings}, Config)
    assert said in str(caught.value)


def test_contradictions_are_named():
    assert PTuningConfig(encoder="lstm", encoder_width=7).problems()[0].startswith("method.encoder_width = 7: must be")
    assert PTuningConfig(encoder="mlp", encoder_width=7).problems() == LptConfig().problems() == []
    assert LptConfig(dropout=1.0).problems() == ["method.dropout = 1.0: must be below 1"]


# -- late prompt tuning -----------------------------------------------------------------------------------


def test_a_layer_that_is_not_there_is_refused():
    backbone = build_backbone("llama")
    with pytest.raises(UserError, match=r"method.layer = 3: .* 3 layers, allowed are 0 to 2"):
        METHODS["lpt"].build(LptConfig(layer=3), backbone)
    assert METHODS["lpt"].build(LptConfig(), backbone).masked_layers == {0}


def test_the_generators_are_their_equations():
    torch.manual_seed(0)
    backbone = build_backbone("llama")
    states, mask = torch.randn(2, 6, 32), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], dtype=torch.bool)
    blank = torch.zeros(2, 3, 32)
    for generator in ("naive", "pooling"):
        config = LptConfig(num_soft_tokens=3, generator=generator, bottleneck=4, normalize_input=False)
        method = METHODS["lpt"].build(config, backbone).eval()
        w1, b1, w2, b2 = (p.detach() for p in (*method.down.parameters(), *method.up.parameters()))
        found = method(1, states, mask, blank)
        for row in range(2):
            inner = states[row, mask[row]] @ w1.T + b1
            if generator == "naive":
                expected = (inner[-1].relu() @ w2.T + b2).view(3, 32)
            else:
                parts = {4: [(0, 2), (1, 3), (2, 4)], 6: [(0, 2), (2, 4), (4, 6)]}[len(inner)]
                expected = torch.stack([inner[a:b].mean(0).relu() @ w2.T + b2 for a, b in parts])
            torch.testing.assert_close(found[row], expected)
        assert method(0, states, mask, blank) is None
        assert method(2, states, mask, blank) is None


@pytest.mark.parametrize("position", ["before_instruction", "after_instruction"])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_no_layer_below_keeps_a_graph(k: int, position: str):
    model = build_model(Case("lpt", {"layer": k, "position": position}), "llama").train()
    seen: list[tuple[int, bool]] = []
    for index, layer in enumerate(model.backbone.layers):
        layer.register_forward_hook(lambda m, args, output, i=index: seen.append((i, output.requires_grad)))
    model.loss(batch(examples()))
    # The last three: after the instruction, the frozen prefix runs all layers first.
    assert seen[-3:] == [(i, i >= k) for i in range(3)]
    assert not any(graph for _, graph in seen[:-3])


def force(token: int):
    """A logits processor: greedy decoding must say `token`, so that two models decode the same text."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)

    return process


def outputs_of_layers(model: AdaptedModel, verb: str, made) -> list[list[Tensor]]:
    """Every pass's outputs of the three layers, in order."""
    found: list[list[Tensor]] = [[] for _ in range(3)]
    handles = [
        layer.register_forward_hook(lambda m, args, output, i=i: found[i].append(output.detach()))
        for i, layer in enumerate(model.backbone.layers)
    ]
    if verb == "generate":
        model.generate(made, max_new_tokens=4, min_new_tokens=4, logits_processor=[force(9)])
    else:
        getattr(model, verb)(made)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("verb", ["loss", "score", "generate"])
def test_below_the_layer_everything_is_as_without_soft_tokens(verb: str):
    """Rotary positions: the text's shift by s changes nothing by itself."""
    s, k, made = 5, 2, batch(examples(), extra_left=2)
    late = outputs_of_layers(build_model(Case("lpt", {"layer": k, "num_soft_tokens": s}), "llama"), verb, made)
    bare = outputs_of_layers(AdaptedModel(build_backbone("llama"), None), verb, made)
    mask = made.instruction_mask
    soft = (~mask).sum(1, keepdim=True) + torch.arange(s)
    assert len(late[0]) == len(bare[0]) == {"loss": 1, "score": 4, "generate": 5}[verb]
    for layer in range(3):
        moved = 0.0
        for number, (with_soft, without) in enumerate(zip(late[layer], bare[layer], strict=True)):
            if number == 0:  # the pass that holds the instruction
                keep = torch.ones(with_soft.shape[:2], dtype=torch.bool).scatter(1, soft, False)
                with_soft = with_soft[keep].view(len(mask), -1, 32)[:, : without.shape[1]]
                real = torch.cat([mask, torch.ones_like(made.response_mask)], 1)[:, : without.shape[1]]
                with_soft, without = with_soft[real], without[real]
            assert with_soft.shape == without.shape
            difference = (with_soft - without).abs().max()
            moved = max(moved, float(difference))
            if layer >= k:  # and every pass notices them above
                assert difference > 1e-2
        assert layer >= k or moved < 1e-4


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "dept", "adept", "ept", "panda"])
def test_input_embeddings_are_as_wide_as_the_table(name: str):
    backbone = zoo.build("opt-narrow")
    assert (backbone.embedding_size, backbone.hidden_size) == (16, 32)
    config = METHODS[name].config(name=name)
    method = METHODS[name].build(config, backbone)
    assert method.input_embeddings().shape == (config.num_soft_tokens, 16)
    assert sum(p.numel() for p in method.parameters()) == METHODS[name].count(config, backbone)


def test_layers_cannot_start_from_narrower_embeddings():
    with pytest.raises(UserError, match="Lopa starts layers from token embeddings.*16 wide, layers 32"):
        METHODS["lopa"].build(METHODS["lopa"].config(name="lopa"), zoo.build("opt-narrow"))
