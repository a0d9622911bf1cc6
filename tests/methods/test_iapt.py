"""IAPT's switches: what each of them changes, and only that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from iapt.config.schema import Config
from iapt.evaluation.activations import observe, write_activations
from iapt.methods.iapt import Iapt, IaptConfig
from iapt.methods.registry import METHODS
from iapt.model.adapted import AdaptedModel
from iapt.model.edits.keys_values import KeysValues
from iapt.model.edits.layer_input import LayerInput
from iapt.model.method import BiLevel
from iapt.nn.rational import Rational
from iapt.runs import stages
from tests.contracts.conftest import batch, build_backbone, examples

BASE = IaptConfig(name="iapt", bottleneck=8)


def make(layers: int = 4, **options) -> Iapt:
    torch.manual_seed(1)
    return Iapt(replace(BASE, **options), layers, 32)


def test_a_measured_setup_stays_what_it_was():
    config = IaptConfig(name="iapt")
    assert (config.pooling, config.activation, config.upper_activation) == ("self_attention", "rational", None)
    assert (config.rational_start, config.degrees, config.output_start) == ("gelu", (6, 5), "normal")
    assert (config.activation_training, config.num_soft_tokens, config.size_knob().field) == ("strict", 4, "bottleneck")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"activation_training": "strict", "held_out_share": 0.2}, BiLevel("activations.", "train", 0.2)),
        ({"activation_training": "paper"}, BiLevel("activations.", "dev", 0.1)),
        ({"activation_training": "joint"}, None),
        ({"activation_training": "frozen"}, None),
        ({"activation": "gelu"}, None),
        ({"activation": "relu", "upper_activation": "rational"}, BiLevel("activations.", "train", 0.1)),
    ],
)
def test_activation_training(options: dict, expected: BiLevel | None):
    method = make(**options, activation_learning_rate=7e-5)
    assert method.bilevel == expected
    assert method.lr_overrides == {"activations.": 7e-5}
    learned = {name for name in method.trainable() if name.startswith("activations.")}
    layers = {"strict": 4, "paper": 4, "joint": 4, "frozen": 0}[options.get("activation_training", "strict")]
    if "activation" in options:
        layers = 2 if "upper_activation" in options else 0
    assert len(learned) == 2 * layers  # numerators and denominators


def test_a_frozen_activation_is_saved_with_the_rest():
    method = make(activation_training="frozen", rational_start="tanh")
    assert {f"activations.{layer}.numerator" for layer in range(4)} <= set(method.state_dict())
    assert torch.equal(method.activations[3].numerator, Rational((6, 5), "tanh").numerator)


@pytest.mark.parametrize(("layers", "lower"), [(4, 2), (3, 2), (1, 1)])
def test_halves(layers: int, lower: int):
    method = make(layers, activation="relu", upper_activation="gelu")
    assert [type(a) for a in method.activations] == [nn.ReLU] * lower + [nn.GELU] * (layers - lower)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "identity"])
def test_a_fixed_activation_is_the_function(activation: str):
    method = make(1, activation=activation)
    function = {"identity": lambda x: x, "tanh": torch.tanh}.get(activation) or getattr(nn.functional, activation)
    x = torch.linspace(-3, 3, 13)
    assert torch.equal(method.activations[0](x), function(x))


@pytest.mark.parametrize("pooling", ["self_attention", "mean", "max", "last"])
def test_pooling(pooling: str):
    """On the bottleneck states of 8 tokens: 4 soft tokens, so segments of two tokens each."""
    method, states = make(1, pooling=pooling, activation="identity", normalize_input=False), torch.randn(1, 8, 32)
    generator = method.generators[0]
    z = states @ generator.down
    pairs = z.unflatten(1, (4, 2))
    pooled = {"mean": pairs.mean(2), "max": pairs.amax(2), "last": z[:, 4:]}.get(pooling)
    if pooled is None:
        pooled = (z @ generator.queries).softmax(1).mT @ z
    mask = torch.ones(1, 8, dtype=torch.bool)
    torch.testing.assert_close(method(0, states, mask, torch.zeros(1, 4, 32)), pooled @ generator.up)
    assert hasattr(generator, "queries") == (pooling == "self_attention")


def test_gates_start_shut_on_the_value_side_only():
    method = make(output_start="gated")
    keys, values = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8).bfloat16()
    assert [type(edit) for edit in method.edits()] == [LayerInput, KeysValues]
    got_keys, got_values = method.keys_values(1, keys, values)
    assert torch.equal(got_keys, keys)
    assert not got_values.any()
    with torch.no_grad():
        method.gates[1] = 0.5
    opened = method.keys_values(1, keys, values)[1]
    assert opened.dtype == torch.bfloat16
    torch.testing.assert_close(opened, values * torch.tanh(torch.tensor(0.5)).bfloat16())
    assert not method.keys_values(2, keys, values)[1].any()
    assert [type(edit) for edit in make().edits()] == [LayerInput]


def test_shut_gates_are_no_no_op():
    """The soft tokens' keys still take their share of the attention."""
    from iapt.model.adapted import AdaptedModel

    scores = []
    for method in ("gated", None):
        backbone = build_backbone("llama")
        torch.manual_seed(1)
        built = METHODS["iapt"].build(replace(BASE, output_start="gated"), backbone) if method else None
        scores.append(AdaptedModel(backbone, built).score(batch(examples())))
    assert (scores[0] - scores[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"pooling": "max"},
        {"output_start": "gated"},
        {"activation_training": "frozen"},
        {"activation": "tanh", "upper_activation": "rational"},
        {"numerator_degree": 5, "denominator_degree": 4, "share_every": 3},
    ],
)
def test_counted_parameters(options: dict):
    backbone = build_backbone("llama")
    config = replace(BASE, **options)
    method = METHODS["iapt"].build(config, backbone)
    assert METHODS["iapt"].count(config, backbone) == sum(p.numel() for p in method.trainable().values())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"numerator_degree": 3}, "method.numerator_degree/denominator_degree = 3/5: allowed are 6/5, 5/4"),
        ({"upper_activation": "elu"}, "method.upper_activation = elu: allowed are null, rational, relu, gelu"),
        ({"held_out_share": 1.0}, "method.held_out_share = 1.0: must be above 0 and below 1"),
        ({"held_out_share": 0.0}, "method.held_out_share = 0.0: must be above 0 and below 1"),
    ],
)
def test_problems(options: dict, line: str):
    (found,) = replace(BASE, **options).problems()
    assert found.startswith(line)
    assert not BASE.problems()


def reported(folder: Path, method: Iapt, states: list[torch.Tensor]) -> tuple[list[dict], list[str]]:
    """Layers of `activations.json` and the lines, after the method has seen these instructions at every layer."""

    def encode() -> None:
        for one in states:
            mask = torch.ones(one.shape[:2], dtype=torch.bool)
            for layer in range(len(method.activations)):
                method(layer, one, mask, torch.zeros(1, 4, 32))

    lines = write_activations(folder, method.observed(), observe(method.observed(), encode))
    assert (folder / "activations.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return json.loads((folder / "activations.json").read_text())["layers"], lines


def test_the_report_of_an_untrained_method_shows_its_start(tmp_path: Path):
    layers, lines = reported(tmp_path, make(2), [torch.randn(3, 8, 32)])
    assert [layer["activation"] for layer in layers] == ["rational", "rational"]
    for layer in layers:
        assert layer["start"] == layer["end"]
        assert layer["drift"] == {"numerator": 0, "denominator": 0}
        assert layer["max_distance_from_start"] == 0
        assert 0 < layer["max_distance_from_gelu"] < 0.0041
        assert [root["x"] for root in layer["roots"]] == [0.0]  # q = b_2 x^2 + b_4 x^4 touches 0 there, unbent
        assert not layer["roots"][0]["flagged"]
    assert len(lines) == 1
    assert str(tmp_path / "activations.png") in lines[0]


def test_the_report_sees_every_input_and_every_change(tmp_path: Path):
    method, states = make(2, rational_start="relu"), [torch.randn(3, 8, 32), torch.randn(2, 8, 32)]
    activation = method.activations[1]
    with torch.no_grad():
        activation.numerator[3] += 0.05
        activation.denominator[1] -= 0.02
    given = []
    handle = activation.register_forward_pre_hook(lambda _, args: given.append(args[0].flatten()))
    (_, layer), _ = reported(tmp_path, method, states)
    handle.remove()
    x = torch.cat(given).detach()
    assert layer["drift"] == {"numerator": pytest.approx(0.05), "denominator": pytest.approx(0.02)}
    inputs = layer["inputs"]
    assert (inputs["count"], inputs["min"], inputs["max"]) == (len(x), x.min(), x.max())
    counts, edges = inputs["histogram"]["counts"], inputs["histogram"]["edges"]
    assert sum(counts) == len(x) == 5 * 4 * 8
    assert counts == torch.histogram(x, torch.tensor(edges))[0].int().tolist()
    grid = torch.linspace(float(x.min()), float(x.max()), 1000)
    learned = activation(grid)
    for key, other in (("start", Rational((6, 5), "relu")), ("gelu", nn.GELU())):
        expected = (learned - other(grid)).abs().max().item()
        assert layer[f"max_distance_from_{key}"] == pytest.approx(expected, rel=1e-2)


def test_the_report_flags_a_kink_only_inside_the_inputs_range(tmp_path: Path):
    method, states = make(2), torch.randn(3, 8, 32)
    for activation, root in zip(method.activations, (0.5, 50.0), strict=True):
        with torch.no_grad():  # q = x (x - root)
            activation.denominator.copy_(torch.tensor([-root, 1.0, 0.0, 0.0, 0.0]))
    layers, lines = reported(tmp_path, method, [states])
    near, far = layers
    assert [root["x"] for root in near["roots"]] == pytest.approx([0.0, 0.5])
    assert [root["x"] for root in far["roots"]] == pytest.approx([0.0])
    assert near["roots"][1]["flagged"]
    assert "layer 0 at x = 0.5" in lines[1]
    # The jump of the slope, measured.
    activation, step = method.activations[0].double(), 1e-6
    around = activation(torch.tensor([0.5 - step, 0.5, 0.5 + step], dtype=torch.float64)).diff() / step
    assert near["roots"][1]["slope_jump"] == pytest.approx(around.diff().abs().item(), rel=1e-3)


def test_the_report_knows_fixed_activations_and_halves(tmp_path: Path):
    method = make(2, activation="relu", upper_activation="rational")
    (low, high), _ = reported(tmp_path, method, [torch.randn(3, 8, 32)])
    assert (low["activation"], high["activation"]) == ("relu", "rational")
    assert low["max_distance_from_gelu"] == pytest.approx(0.17, abs=0.01)
    assert low["inputs"]["count"] == 3 * 4 * 8
    assert set(low) == {"layer", "activation", "max_distance_from_gelu", "inputs"}


def test_other_processes_prefill_but_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    backbone, ran = build_backbone("llama"), []
    model = AdaptedModel(backbone, Iapt(IaptConfig(), backbone.num_layers, backbone.hidden_size))
    monkeypatch.setattr(model, "prefill", lambda batch: ran.append(len(batch.indices)))
    other = SimpleNamespace(is_main_process=False, device=torch.device("cpu"))
    assert stages.report(Config(), model, examples(), other, tmp_path) == []
    assert sum(ran) == len(examples())
    assert not list(tmp_path.iterdir())
    assert not any(a._forward_pre_hooks for a in model.method.activations)
