"""Other people's implementations, and the equations: soft prompts against peft, IDPG against a slow reference."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoder, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from iapt.model.adapted import AdaptedModel
from tests.contracts.conftest import Case, batch, build_backbone, build_model, examples
from tests.contracts.test_iapt_reference import llama_layer, rms_norm, run_in_float64

SHAPES = ("llama", "gpt2", "gemma2")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = 4


def peft_model(shape: str, config) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(build_backbone(shape).lm, config).eval()


def peft_prompt_tuning(shape: str, ours: AdaptedModel) -> nn.Module:
    model = peft_model(shape, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(ours.method.prompt)
    return model


def peft_prefix_tuning(shape: str, ours: AdaptedModel, projection: bool) -> nn.Module:
    source = ours.method.source
    model = peft_model(
        shape,
        PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prefix_projection=projection, encoder_hidden_size=6
        ),
    )
    theirs = model.prompt_encoder["default"]
    with torch.no_grad():
        if not projection:
            theirs.embedding.weight.copy_(source.prompts.transpose(0, 1).flatten(1))
            return model
        theirs.embedding.weight.copy_(source.prompts)
        theirs.transform[0].load_state_dict(source.down.state_dict())
        theirs.transform[2].weight.copy_(torch.cat([m.weight for m in source.up]))
        theirs.transform[2].bias.copy_(torch.cat([m.bias for m in source.up]))
    return model


def right_padded(items: list, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Instruction and response of every row, padding behind them: ids and mask."""
    rows = [torch.tensor([*item.instruction, *item.response]) for item in items]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


@torch.no_grad()
def assert_same_response_logits(ours: AdaptedModel, theirs: nn.Module, items: list) -> None:
    ids, mask = right_padded(items)
    logits = theirs(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
    made = batch(items, extra_left=2)
    found = ours.engine.response_logits(made)
    total = 0.0
    for row, item in enumerate(items):
        start, count = len(item.instruction) - 1, len(item.response)
        expected = logits[row, start : start + count]
        torch.testing.assert_close(found[row, :count], expected, **TOLERANCE)
        total -= float(expected.log_softmax(-1)[torch.arange(count), torch.tensor(item.response)].sum())
    assert float(ours.loss(made, "sum")) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_prompt_tuning_is_pefts(shape: str):
    ours = build_model(Case("prompt_tuning", {"num_soft_tokens": TOKENS}), shape)
    assert_same_response_logits(ours, peft_prompt_tuning(shape, ours), examples())


# peft hands transformers the cache under its former name.
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
# With grouped heads peft shrinks P' itself to their width, so there only the raw form can be compared.
@pytest.mark.parametrize(("shape", "projection"), [*((shape, False) for shape in SHAPES), ("gpt2", True)])
def test_prefix_tuning_is_pefts(shape: str, projection: bool):
    options = {"num_soft_tokens": TOKENS, "form": "keys_values", "mlp_width": 6}
    options["reparameterization"] = "mlp" if projection else "none"
    ours = build_model(Case("prefix_tuning", options), shape)
    assert_same_response_logits(ours, peft_prefix_tuning(shape, ours, projection), examples())


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tunings_encoder_is_pefts(encoder: str):
    """From there on it is prompt tuning, which is compared above."""
    ours = build_model(
        Case("p_tuning", {"num_soft_tokens": TOKENS, "encoder": encoder, "encoder_width": 12}), "llama"
    ).method
    config = PromptEncoderConfig(
        token_dim=32,
        num_virtual_tokens=TOKENS,
        num_transformer_submodules=1,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=6 if encoder == "lstm" else 12,  # peft counts one direction
        encoder_num_layers=2,
        encoder_dropout=0.0,
    )
    theirs = PromptEncoder(config)
    theirs.embedding.weight.copy_(ours.table)
    if encoder == "lstm":
        theirs.lstm_head.load_state_dict(ours.encoder.lstm.state_dict())
        theirs.mlp_head.load_state_dict(ours.encoder.head.state_dict())
    else:
        theirs.mlp_head.load_state_dict(ours.encoder.state_dict())
    torch.testing.assert_close(ours.input_embeddings(), theirs(torch.arange(TOKENS)))


@torch.no_grad()
def test_left_padding_changes_pefts_prompt_tuning_but_not_ours():
    """Invariant 3 in the terms of a generating user: what follows the instruction, with and without five pads."""
    ours = build_model(Case("prompt_tuning", {"num_soft_tokens": TOKENS}), "llama")
    theirs = peft_prompt_tuning("llama", ours)
    items = examples()[4:]
    item = torch.tensor([items[0].instruction])
    padded = nn.functional.pad(item, (5, 0), value=0)
    plain = theirs(input_ids=item, attention_mask=torch.ones_like(item)).logits[:, -1]
    moved = theirs(input_ids=padded, attention_mask=(padded > 0).long()).logits[:, -1]
    assert (plain - moved).abs().max() > 1e-2
    first = ours.engine.response_logits(batch(items))[:, 0]
    torch.testing.assert_close(first, plain, **TOLERANCE)
    torch.testing.assert_close(ours.engine.response_logits(batch(items, extra_left=5))[:, 0], plain, **TOLERANCE)


# -- IDPG in float64, one row, no hooks, no cache, no padding ---------------------------------------------


def dense(linear: nn.Module) -> Tensor:
    """The map's matrix (in, out), PHM's written out."""
    if isinstance(linear, nn.Linear):
        return linear.weight.T
    return sum(torch.kron(a, b) for a, b in zip(linear.left, linear.right, strict=True))


def idpg_tokens(method, index: int, states: Tensor) -> Tensor:
    """The generator for one instruction: states (n, d) -> (s, d)."""
    config = method.config
    generator = method.generators[index if len(method.generators) > 1 else 0]
    h = rms_norm(states, 1.0, 1e-6)
    f = h[-1] if config.pooling == "last" else h.mean(0)
    inner = f @ dense(generator.down) + generator.down.bias
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    out = (inner @ dense(generator.up)).view(config.num_soft_tokens, -1)
    return out + method.bias[index if len(method.bias) > 1 else 0]


def idpg_loss(model: AdaptedModel, instruction: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    lm, method = model.lm, model.method
    config, table, n, s = lm.config, lm.get_input_embeddings().weight, len(instruction), method.num_soft_tokens
    words, answer = table[torch.tensor(instruction)], table[torch.tensor(response)]
    soft = torch.zeros(s, config.hidden_size, dtype=torch.float64)
    single, before = method.config.layers == "single", method.position == "before_instruction"
    bare = [words]
    for layer in lm.model.layers:
        bare.append(llama_layer(layer, config, bare[-1]))
    encoding = rms_norm(bare[-1], lm.model.norm.weight, config.rms_norm_eps)
    at = 0 if before else n - 1  # where the soft tokens begin
    x = torch.cat([words[:at], soft, words[at:], answer])
    for index, layer in enumerate(lm.model.layers):
        if index == 0 or not single:
            read = encoding if single else x[s : s + n] if before else bare[index]
            x = torch.cat([x[:at], x[at : at + s] + idpg_tokens(method, index, read), x[at + s :]])
        x = llama_layer(layer, config, x)
    x = rms_norm(x, lm.model.norm.weight, config.rms_norm_eps)
    log_p = (x @ lm.lm_head.weight.T).log_softmax(-1)
    return -sum(log_p[n + s - 1 + i, token] for i, token in enumerate(response))


@pytest.mark.parametrize("position", ["before_instruction", "after_instruction"])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": "multi", "projection": "phm", "bottleneck": 8, "phm_n": 4, "sharing": "layer_bias"},
        {"layers": "multi", "projection": "dense", "bottleneck": 8, "sharing": "none", "pooling": "mean"},
        {"layers": "single", "projection": "phm", "bottleneck": 8, "phm_n": 4},
    ],
    ids=["multi-phm", "multi-none-mean", "single-phm"],
)
def test_idpg_equals_its_equations_in_float64(position: str, options: dict, monkeypatch: pytest.MonkeyPatch):
    model = build_model(Case("idpg", {"position": position, **options}), "llama", dtype=torch.float64)
    model.method.double()
    run_in_float64(model, monkeypatch)
    items = examples()
    with torch.no_grad():
        expected = torch.stack([idpg_loss(model, item.instruction, item.response) for item in items])
        alone = torch.stack([model.loss(batch([item]), "sum") for item in items])
        together = model.loss(batch(items, extra_left=3, extra_right=2), "sum")
    assert (alone - expected).abs().max() < 1e-9
    assert (together - expected.sum()).abs() < 1e-9
