"""iapt inside one's own code: attach a method to a transformers causal LM, save it, load it again.

    lm, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    model = iapt.attach(lm, {"name": "iapt", "bottleneck": 64}, tokenizer=tokenizer)
    ...  # model.loss(batch).backward(), torch.optim.AdamW(model.parameter_groups(3e-3))
    model.save("my-adapter")
    model = iapt.load("my-adapter", backbone=lm, tokenizer=tokenizer)

The folder is what a run writes, so `load` reads the folders of `iapt-train` too. Several prompt-space models may
share one LM: each writes its soft tokens only during its own passes. A weight-space method changes the LM for
everyone who holds it, so nothing can be attached beside it.

A loop of one's own calls what its method offers to a loop (`fit`, `start`, `penalty`, `after_step`, see
`iapt.model.method.Method`); most methods leave all of it alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iapt.config.errors import UserError
from iapt.config.method import MethodConfig
from iapt.config.schema import to_dict
from iapt.data.batch import Batch, collate, encode_examples
from iapt.data.task import Example
from iapt.methods.registry import spec_of
from iapt.methods.settings import method_config
from iapt.model.adapted import AdaptedModel
from iapt.model.backbone import Backbone
from iapt.model.checkpoint import check_backbone, load_adapter
from iapt.model.method import WeightMethod
from iapt.model.stored import need
from iapt.preflight import check
from iapt.runs.restore import put_back
from iapt.runs.transfer import start_from

PRECISIONS = ("fp32", "bf16")


def attach(
    lm: PreTrainedModel,
    method: Mapping[str, Any] | MethodConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precision: str | None = None,
    activation_checkpointing: bool = False,
    preflight: bool = True,
) -> AdaptedModel:
    """Freeze a causal LM and join it with a method at its start.

    The LM is changed in place: its parameters no longer require gradients, it is in eval mode. The method's start
    is drawn from torch's global generator.

    Args:
        lm: any transformers causal LM, on any device and in any dtype.
        method: its name and settings as in `configs/method`, for example {"name": "iapt", "bottleneck": 64}.
        tokenizer: only methods that start from words need one. Without a pad token it is given its eos for one.
        precision: `bf16` computes under autocast, `fp32` in the LM's own dtype; None: bf16 if that is the LM's.
        activation_checkpointing: recompute layer activations in the backward pass. Between `loss` and `eval()` the
            LM then belongs to this model alone.
        preflight: probe the model on a few short rows (`iapt.preflight`), before it is returned with what that
            found in `.preflight`; False: trust it as it is.

    Raises:
        UserError: a model that the probe finds wrong, settings that the command line would refuse as well, a method
            that is made of a task's text, an LM that carries a weight-space method or peft's layers already, an
            adapter to start from (`init_from`) that does not fit.
    """
    model = _attach(lm, method, tokenizer, precision, activation_checkpointing)
    assert model.meta is not None
    start_from(model, method_config(model.meta["method"]), model.meta["backbone"])
    return _probed(model) if preflight else model


def _attach(
    lm: PreTrainedModel,
    method: Mapping[str, Any] | MethodConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    precision: str | None,
    activation_checkpointing: bool,
) -> AdaptedModel:
    _refuse_changed(lm)
    config = method_config(to_dict(method) if isinstance(method, MethodConfig) else method)
    spec = spec_of(config)
    if spec.rewrite is not None:
        raise UserError(
            f"method.name = {config.name!r}: rewrites a task's text, so there is nothing to attach; use iapt-train"
        )
    if precision not in (None, *PRECISIONS):
        raise UserError(f"precision = {precision!r}: allowed are {', '.join(PRECISIONS)}")
    lm.requires_grad_(False)
    lm.eval()
    backbone = _backbone(lm, tokenizer)
    identity = backbone.identity()  # before the method changes the modules
    built = spec.build(config, backbone)
    model = AdaptedModel(
        backbone,
        built,
        precision=precision or ("bf16" if lm.dtype == torch.bfloat16 else "fp32"),
        activation_checkpointing=activation_checkpointing,
        meta={
            "method": to_dict(config),
            "backbone": identity,
            "trainable_params": sum(p.numel() for p in built.trainable().values()),
        },
    )
    if isinstance(built, WeightMethod):
        lm.iapt_method = config.name  # a copy of the LM carries the mark as it carries the weights
    return model


def load(
    path: str | Path,
    *,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    precision: str | None = None,
    activation_checkpointing: bool = False,
    preflight: bool = True,
) -> AdaptedModel:
    """Attach a saved adapter to the LM it was trained on.

    Args:
        path: what `AdaptedModel.save` or a run wrote.
        backbone: the LM; it is changed as `attach` changes it.
        tokenizer, precision, activation_checkpointing, preflight: as in `attach`.

    Raises:
        UserError: a folder that cannot be read, an LM that the adapter was not trained on, and all that `attach`
            raises.
    """
    folder = Path(path)
    tensors, meta = load_adapter(folder)
    need(meta, f"checkpoint = {folder}", "method.name", "backbone")
    _refuse_changed(backbone)
    check_backbone(_backbone(backbone, tokenizer).identity(), meta["backbone"], folder)
    # Not by way of what training started from, which need not be there any more.
    model = _attach(backbone, meta["method"], tokenizer, precision, activation_checkpointing)
    put_back(model, tensors, f"checkpoint = {folder}")
    # Gradients of a whole backbone take memory that nobody who scores has use for.
    return _probed(model, gradients=not method_config(meta["method"]).trains_backbone) if preflight else model


def _probed(model: AdaptedModel, gradients: bool = True) -> AdaptedModel:
    """The model, once the probe has passed; else it is detached."""
    assert model.meta is not None
    try:
        name = model.meta["method"]["name"]
        model.preflight = check(model, name, gradients=gradients, switch="preflight=False")
    except BaseException:
        model.detach()
        raise
    return model


def make_batch(
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    responses: Sequence[str] | None = None,
    *,
    choices: Sequence[str] = (),
    separator: str = " ",
) -> Batch:
    """Texts as a batch, tokenised as in a run: `separator` belongs to the response, which ends in eos.

    Args:
        tokenizer: the LM's.
        instructions: B >= 1 texts; nothing is cut off.
        responses: as many, for `loss`; None for `generate` and `score`.
        choices: what `score` is to compare.
        separator: stands between instruction and response.

    Returns:
        A batch on the CPU; `batch.to(device)` moves it.

    Raises:
        UserError: numbers that differ, an instruction of fewer than 2 tokens, a response or choice of none.
    """
    if not instructions or (responses is not None and len(responses) != len(instructions)):
        given = "no" if responses is None else len(responses)
        raise UserError(f"make_batch: {len(instructions)} instructions and {given} responses; give one or more of both")
    # Without responses the instructions stand in for them, and are taken off again.
    pairs = zip(instructions, instructions if responses is None else responses, strict=True)
    encoded, _ = encode_examples(
        [
            Example(instruction, response, label=choices.index(response) if response in choices else None)
            for instruction, response in pairs
        ],
        tokenizer,
        choices=choices,
        separator=separator,
        max_length=sys.maxsize,
        max_response_length=sys.maxsize,
        context=None,
    )
    batch = collate(encoded, tokenizer.pad_token_id or 0)  # masked, so any id will do
    if responses is None:
        batch.response_ids, batch.response_mask = batch.response_ids[:, :0], batch.response_mask[:, :0]
    return batch


class _NoTokenizer:
    """Stands in where none was given: knows how to pad, and says what is missing when asked for more."""

    def __init__(self, lm: PreTrainedModel) -> None:
        def find(key: str) -> int | None:
            for settings in (lm.generation_config, lm.config):
                value = getattr(settings, key, None)
                if value not in (None, []):
                    return int(value[0] if isinstance(value, list) else value)
            return None

        self.eos_token_id = find("eos_token_id")
        pad = find("pad_token_id")
        self.pad_token_id = pad if pad is not None else self.eos_token_id or 0
        self._size = lm.get_input_embeddings().num_embeddings

    def __len__(self) -> int:
        return self._size

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError("tokenizer = None: this method needs the backbone's; give tokenizer=...")


def _backbone(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Backbone:
    name = lm.config.name_or_path or lm.config.model_type
    given: Any = _NoTokenizer(lm) if tokenizer is None else tokenizer
    if given.pad_token_id is None:
        given.pad_token = given.eos_token or given.unk_token
    if given.pad_token_id is None:
        raise UserError("tokenizer: has no pad, eos or unk token to pad with; set tokenizer.pad_token")
    return Backbone(name, lm, given)


def _refuse_changed(lm: PreTrainedModel) -> None:
    if isinstance(lm, PeftModel):
        raise UserError("lm: is wrapped by peft; give the bare LM, which its unload() returns")
    carried = getattr(lm, "iapt_method", None)
    if carried is None and any(isinstance(module, BaseTunerLayer) for module in lm.modules()):
        carried = "peft"
    if carried is not None:
        raise UserError(
            f"lm: already carries the weights of method {carried!r}, which would become part of the backbone; "
            "load a fresh copy of the LM"
        )
