"""SPT: its equations, what a layer sees that is not kept, and how the search ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from iapt.config.errors import ConfigError, UserError
from iapt.config.schema import Config
from iapt.methods.registry import METHODS
from iapt.methods.settings import load_config
from iapt.methods.spt import Spt, SptConfig
from iapt.model.adapted import AdaptedModel
from iapt.model.method import BiLevel
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples

BASE = SptConfig(name="spt", num_soft_tokens=3, bottleneck=8)


def make(num_layers: int = 4, seed: int = 1, **options) -> Spt:
    torch.manual_seed(seed)
    return Spt(replace(BASE, **options), num_layers, 32)


def test_the_start():
    method = make(bottleneck=400, output_std=0.3)
    assert method.gates.tolist() == [0.0] * 4
    assert method.kept.tolist() == [False] * 4
    assert method.masked_layers == frozenset()
    for generator in method.generators.values():
        assert float(generator.down.detach().std()) == pytest.approx(32**-0.5, rel=0.05)
        assert float(generator.up.detach().std()) == pytest.approx(0.3, rel=0.05)
    assert make(num_layers=5).keep == 3  # half of them, rounded up
    assert make(keep=1).keep == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gate_training": "strict", "held_out_share": 0.2}, BiLevel("gates", "train", 0.2)),
        ({"gate_training": "paper"}, BiLevel("gates", "dev", 0.1)),
        ({"gate_training": "joint"}, None),
        ({"layers": [0, 3]}, None),
    ],
)
def test_what_the_gates_learn_from(options: dict, expected: BiLevel | None):
    assert make(**options).bilevel == expected


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_a_generator_is_its_equation(reduce: str):
    method = make(reduce=reduce)
    states, mask = torch.randn(2, 6, 32) * 50, torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], dtype=torch.bool)
    found = method(2, states, mask, torch.zeros(2, 3, 32))
    down, up = (p.detach() for p in method.generators["2"].parameters())
    segments = {4: [(0, 2), (1, 3), (2, 4)], 6: [(0, 2), (2, 4), (4, 6)]}
    for row in range(2):
        real = states[row, mask[row]]
        inner = real / (real**2).mean(-1, keepdim=True).sqrt() @ down
        parts = [inner[a:b].mean(0) if reduce == "mean" else inner[a:b].amax(0) for a, b in segments[len(inner)]]
        torch.testing.assert_close(found[row], torch.stack(parts).clamp(min=0) @ up, rtol=1e-4, atol=1e-5)


def test_a_gate_multiplies_the_values_until_layers_are_kept():
    method, keys, values = make(), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    with torch.no_grad():
        method.gates.copy_(torch.tensor([0.0, 2.0, -1.0, 0.5]))
    for layer, gate in enumerate([0.5, 0.8807971, 0.2689414, 0.6224593]):
        found = method.keys_values(layer, keys, values)
        assert torch.equal(found[0], keys)
        torch.testing.assert_close(found[1], values * gate)
    method.kept[2] = True
    assert torch.equal(method.keys_values(2, keys, values)[1], values)


@pytest.mark.parametrize("position", ["before_instruction", "after_instruction"])
def test_open_gates_are_no_gates(position: str):
    options = {"bottleneck": 8, "position": position}
    searched = build_model(Case("spt", options), "llama")
    given = build_model(Case("spt", {**options, "layers": [2, 0, 1]}), "llama")
    with torch.no_grad():
        searched.method.gates.fill_(torch.inf)
    state = {n: t for n, t in searched.adapter_state().items() if n.startswith("generators.")}
    given.load_adapter_state(state)
    torch.testing.assert_close(searched.score(batch(examples())), given.score(batch(examples())))


def slow_logits(model: AdaptedModel, kept: set[int], ids: list[int], instruction: int, place: int) -> Tensor:
    """(len(ids), V) of one row, layer by layer without cache or hooks: the soft tokens stand before text token `place`,
    whose layers get them or run on the text alone, at the same positions."""
    method, decoder = model.method, model.lm.model
    s = method.num_soft_tokens
    text = decoder.embed_tokens(torch.tensor([ids]))
    where = torch.arange(len(ids))
    positions = where + s * (where >= place)
    bare = text
    for layer, module in enumerate(decoder.layers):
        # With the soft tokens behind it, the instruction is read as the bare backbone has it.
        read = (text if place == 0 else bare)[:, :instruction]
        bare = _layer(decoder, module, bare, where)
        if layer not in kept:
            text = _layer(decoder, module, text, positions)
            continue
        states = read / (read**2).mean(-1, keepdim=True).add(1e-6).sqrt()
        down, up = method.generators[str(layer)].parameters()
        inner, n = states[0] @ down, instruction
        pooled = torch.stack([inner[i * n // s : -((i + 1) * n // -s)].mean(0) for i in range(s)])
        soft = (pooled.relu() @ up)[None]
        both = torch.cat([text[:, :place], soft, text[:, place:]], 1)
        out = _layer(decoder, module, both, torch.arange(both.shape[1]))
        text = torch.cat([out[:, :place], out[:, place + s :]], 1)
    return model.lm.lm_head(decoder.norm(text))[0]


def _layer(decoder, module, hidden: Tensor, positions: Tensor) -> Tensor:
    width = hidden.shape[1]
    mask = torch.full((width, width), -torch.inf).triu(1)[None, None]
    rotary = decoder.rotary_emb(hidden, positions[None])
    return module(hidden, attention_mask=mask, position_ids=positions[None], position_embeddings=rotary)


@pytest.mark.parametrize("kept", [{0, 1, 2}, {0, 2}, {1}, {2}])
@pytest.mark.parametrize("position", ["before_instruction", "after_instruction"])
@torch.no_grad()
def test_a_layer_that_is_not_kept_sees_the_text_alone(position: str, kept: set[int]):
    model = build_model(Case("spt", {"bottleneck": 8, "position": position}), "llama")
    for layer in kept:
        model.method.kept[layer] = True
    assert model.method.masked_layers == {0, 1, 2} - kept
    for item in examples():
        ids, n = [*item.instruction, *item.response], len(item.instruction)
        place = 0 if position == "before_instruction" else n - 1
        expected = slow_logits(model, kept, ids, n, place)[n - 1 : -1]
        torch.testing.assert_close(model.engine.response_logits(batch([item]))[0], expected, rtol=1e-4, atol=1e-4)


# -- the search's end -------------------------------------------------------------------------------------


def test_the_search_ends_with_the_largest_gates_and_fresh_generators():
    method = make(keep=2, search_share=0.25)
    method.on_train_start(20)
    fresh = {name: p.clone() for name, p in method.generators.named_parameters()}
    with torch.no_grad():
        for parameter in method.generators.parameters():
            parameter.normal_()
        method.gates.copy_(torch.tensor([0.1, -3.0, 0.7, 0.0]))
    assert not any(method.on_phase_change(step) or method.can_be_checkpoint(step) for step in range(5))
    assert method.on_phase_change(5)
    assert method.can_be_checkpoint(5)
    assert method.kept.tolist() == [True, False, True, False]
    assert method.masked_layers == {1, 3}
    assert all(torch.equal(p, fresh[name]) for name, p in method.generators.named_parameters())
    assert {name.rpartition(".")[0] for name in method.trainable()} == {"generators.0", "generators.2"}
    assert method.bilevel is None
    assert not any(method.on_phase_change(step) for step in range(6, 21))
    assert method.gates.tolist() == pytest.approx([0.1, -3.0, 0.7, 0.0])  # still there to be reported


def test_equal_gates_keep_the_lower_layers():
    method = make(keep=2)
    method.on_train_start(2)
    assert method.on_phase_change(1)
    assert method.kept.tolist() == [True, True, False, False]


def test_a_resumed_search_knows_its_generators_start():
    first, second = make(), make(seed=2)
    for method in (first, second):
        method.on_train_start(8)
    fresh = {name: p.clone() for name, p in first.generators.named_parameters()}
    second.load_training_state(first.training_state())
    assert not torch.equal(second.generators["0"].down, fresh["0.down"])
    assert second.on_phase_change(4)
    assert all(torch.equal(p, fresh[name]) for name, p in second.generators.named_parameters())


def test_chosen_layers_are_not_searched_again():
    """As an adapter brings them that training starts from."""
    method = make()
    method.kept[1] = True
    method.on_train_start(1)
    assert set(method.trainable()) == {"generators.1.down", "generators.1.up"}
    assert method.bilevel is None
    assert not method.on_phase_change(1)
    given = make(layers=[3])
    given.on_train_start(1)
    assert not given.on_phase_change(1)
    assert given.masked_layers == {0, 1, 2}


@pytest.mark.parametrize(("total", "share"), [(1, 0.5), (3, 0.1), (3, 0.9)])
def test_too_few_steps_are_refused(total: int, share: float):
    with pytest.raises(UserError, match=rf"method.search_share = {share}: of the run's {total} steps it leaves"):
        make(search_share=share).on_train_start(total)


def test_the_report_names_what_is_kept(tmp_path: Path):
    method = make(keep=1)
    with torch.no_grad():
        method.gates[3] = 1.0
    method.on_train_start(2)
    method.on_phase_change(1)
    active, total = 2 * 32 * 8, 4 * 2 * 32 * 8 + 4
    assert method.findings() == [
        f"layers kept: 3; {active} of {total:,} parameters are active; gates: 0.500, 0.500, 0.500, 0.731"
    ]
    assert make(layers=[2, 0]).findings() == ["layers kept: 0, 2; 1,024 of 1,024 parameters are active"]


def test_sizes_on_llama2_7b(llama2_7b):
    count = METHODS["spt"].count
    assert count(SptConfig(), llama2_7b) == 16_777_216 + 32  # "16.8M" in ALoRA's table
    assert count(SptConfig(layers=[30, 31], bottleneck=128), llama2_7b) == 2 * 2 * 4096 * 128


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"search_share": 1.0}, "method.search_share = 1.0: must be above 0 and below 1"),
        ({"held_out_share": 0.0}, "method.held_out_share = 0.0: must be above 0 and below 1"),
        ({"layers": []}, "method.layers = []: expected one layer or more, each of them once"),
        ({"layers": [1, 1]}, "method.layers = [1, 1]: expected one layer or more, each of them once"),
        ({"layers": [1], "keep": 1}, "method.keep = 1: method.layers names what is kept"),
        ({"keep": 0}, "method.keep = 0: must be at least 1"),
        ({"gate_training": "dev"}, "method.gate_training = 'dev': allowed are strict, paper, joint"),
    ],
)
def test_bad_settings_are_named(settings: dict, said: str):
    with pytest.raises(ConfigError) as caught:
        load_config({"task": {"name": "any", "template": "{text}"}, "method": {"name": "spt", **settings}}, Config)
    assert said in str(caught.value)


def test_layers_that_are_not_there_are_refused():
    backbone, build = build_backbone("llama"), METHODS["spt"].build
    with pytest.raises(UserError, match=r"method.layers = \[2, 3\]: backbone llama has 3 layers, \[3\] are not among"):
        build(SptConfig(layers=[2, 3]), backbone)
    with pytest.raises(UserError, match=r"method.keep = 4: backbone llama has 3 layers"):
        build(SptConfig(keep=4), backbone)
