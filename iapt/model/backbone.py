"""The frozen language model and its tokenizer: embedded, from a hub id or folder, or random weights of a shape."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from iapt.config.errors import UserError, nearest
from iapt.config.schema import BackboneConfig
from iapt.model.architecture import context_of, decoder_layers, decoder_of, text_config

TINY_DIR = Path(__file__).parents[1] / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Backbone:
    """A causal LM without trainable parameters, always in eval mode, and what attaching to it needs.

    Attributes:
        name: the name it is reported by.
        lm: any transformers causal LM.
        tokenizer: its tokenizer, with a pad token.
    """

    name: str
    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def hidden_size(self) -> int:
        """d, the width of the residual stream."""
        return int(text_config(self.lm).hidden_size)

    @property
    def embedding_size(self) -> int:
        """e, the width of a token's embedding; where it is not d, the model projects it (OPT-350m)."""
        return int(self.embeddings.weight.shape[-1])

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return len(self.layers)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, whatever the architecture calls them.

        Raises:
            UserError: if the model has no list of num_hidden_layers modules, or is an encoder-decoder.
        """
        return decoder_layers(self.lm)

    @property
    def decoder(self) -> nn.Module:
        """The model without its LM head."""
        return decoder_of(self.lm)

    @property
    def output_size(self) -> int:
        """The width of the states that the LM head reads: d, or e where the model projects them back (OPT-350m)."""
        return int(self.lm.get_output_embeddings().weight.shape[-1])

    @property
    def embeddings(self) -> nn.Embedding:
        """The input embedding table (V, d)."""
        return self.lm.get_input_embeddings()

    @property
    def context(self) -> int | None:
        """The longest sequence the model has positions for, None if it does not say."""
        return context_of(self.lm)

    @property
    def pad_id(self) -> int:
        """The id that padding is made of. Where the tokenizer's own lies outside the embedding table, it is eos:
        masked columns, and rows that have ended, are embedded like all others."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        inside = pad is not None and pad < self.embeddings.weight.shape[0]
        return int(pad if inside or eos is None else eos)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) int64 -> embeddings (..., e)."""
        return self.embeddings(ids)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the backbone of an adapter: architecture, sizes and a fingerprint of the weights."""
        config = self.lm.config
        return {
            "name": self.name,
            "model_type": config.model_type,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": text_config(self.lm).vocab_size,
            "fingerprint": self._fingerprint(),
        }

    def _fingerprint(self) -> str | None:
        """Sixteen hex digits of a sample of every weight, the same for an fp32 and a bf16 copy."""
        if getattr(self.lm, "is_quantized", False):
            return None
        digest = hashlib.sha256()
        for _, parameter in sorted(self.lm.named_parameters()):
            if parameter.is_meta:
                return None
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).float().cpu()
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:16]


MOST_LAYERS = 10_000  # of any kind of layer, and of experts; the deepest models have a few hundred


@contextmanager
def _any_shape() -> Iterator[None]:
    """Sizes that make no model end in whatever their first use ends in: a division by zero, a negative dimension."""
    try:
        yield
    except (ArithmeticError, RuntimeError, LookupError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _refuse_size(shape: dict[str, Any], dtype: torch.dtype) -> None:
    """A slip in a number, or a stranger's adapter, must not fill the memory before a word is said.

    Raises:
        UserError: more layers or experts than any model has, weights that this machine's memory cannot hold.
    """
    for key, value in shape.items():
        if re.search("layer|expert", key) and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"backbone.shape.{key} = {value}: allowed are at most {MOST_LAYERS:,}")
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).parameters())
    needed, there = count * dtype.itemsize, psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"backbone.shape = {shape}: {count:,} parameters in {str(dtype).removeprefix('torch.')} are "
            f"{needed / 2**30:,.0f} GiB, and this machine's memory is {there / 2**30:,.0f} GiB"
        )


def build_backbone(
    config: BackboneConfig,
    *,
    precision: str = "fp32",
    attention: str = "auto",
    device: str | torch.device = "cpu",
) -> Backbone:
    """Load or make the backbone, frozen, in eval mode, on `device`.

    Args:
        config: which one.
        precision: `fp32` or `bf16`; decides the weights' dtype where `config.dtype` is auto.
        attention: transformers' attention implementation; `auto`: the fastest that the model supports without extras.
        device: where the weights go.

    Raises:
        UserError: a path that does not load, a shape that transformers rejects, a missing extra.
    """
    dtype = DTYPES["bfloat16" if precision == "bf16" else "float32"] if config.dtype == "auto" else DTYPES[config.dtype]
    source: str | Path = config.path if config.kind == "pretrained" and config.path else TINY_DIR
    implementation = None if attention == "auto" else attention  # None leaves it to transformers
    disable_progress_bar()  # of the loading of weights: noise beside the run's own
    kind = config.shape.get("model_type")
    if config.kind == "random" and str(kind) not in CONFIG_MAPPING:
        hint = nearest(str(kind), CONFIG_MAPPING)
        raise UserError(
            f"backbone.shape.model_type = {kind!r}: transformers has no such architecture{hint and '; ' + hint}"
        )
    try:
        if config.kind == "random":
            with _any_shape():
                _refuse_size(config.shape, dtype)
                lm = AutoModelForCausalLM.from_config(
                    AutoConfig.for_model(**config.shape), dtype=dtype, attn_implementation=implementation
                )
        else:
            lm = AutoModelForCausalLM.from_pretrained(
                source,
                revision=config.revision or "main",
                dtype=dtype,
                attn_implementation=implementation,
                quantization_config=_quantization(config.quantization),
                device_map={"": device} if config.quantization != "none" else None,
                generation_config=_ends_alone(source, config.revision),
            )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision or "main")
    except (OSError, ValueError, ImportError, KeyError, TypeError, StrictDataclassError) as error:
        what = f"backbone.path = {config.path!r}" if config.kind == "pretrained" else f"backbone.shape = {config.shape}"
        raise UserError(
            f"{what}: could not load backbone '{config.name}' (a hub id or a folder with config.json, weights and "
            f"tokenizer is expected): {_first_line(error)}"
        ) from error
    if config.kind == "random" and text_config(lm).vocab_size < len(tokenizer):
        raise UserError(
            f"backbone.shape.vocab_size = {lm.config.vocab_size}: must be at least {len(tokenizer)}, the size of the "
            "embedded tokenizer that random backbones use"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"backbone '{config.name}': its tokenizer has no pad, eos or unk token to pad with")
    if config.quantization == "none":
        lm.to(device)
    lm.requires_grad_(False)
    lm.eval()
    return Backbone(config.name, lm, tokenizer)


def _ends_alone(source: str | Path, revision: str | None) -> GenerationConfig:
    """Return the tokens that end a text according to generation_config.json, and nothing else of that file.

    No decoding of ours reads the rest (`iapt.model.decoding`), and a combination that transformers holds to be
    impossible would keep it from loading the model at all.
    """
    try:
        path = Path(cached_file(source, "generation_config.json", revision=revision or "main"))
    except OSError:  # there is none
        return GenerationConfig()
    try:
        return GenerationConfig(eos_token_id=json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path.name} holds no JSON object: {_first_line(error)}") from error


def shard_layers(backbone: Backbone, trainable: Iterable[nn.Parameter]) -> None:
    """Shard the frozen decoder layers over all processes (FSDP2); each is gathered just before it runs.

    Trained parameters inside the layers stay whole on every process: they are small, and the trainer averages
    their gradients itself. Embeddings and head stay whole too, since prompts read and score through them.
    """
    from torch.distributed.fsdp import fully_shard

    whole = set(trainable)
    for layer in backbone.layers:
        fully_shard(layer, reshard_after_forward=True, ignored_params=whole & set(layer.parameters()))


def _quantization(kind: str) -> Any:
    if kind == "none":
        return None
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
