"""Speed and memory of training steps and of decoding, beside the bare backbone and beside peft, in one run.

    python scripts/bench.py train                                   the 43M shape in float32
    python scripts/bench.py decode --shape llama2_7b --dtype bfloat16 --device cuda --json table.json

Weights are random, of the shape asked for, or a local folder's: speed does not depend on them. All rivals share one
copy of them. They take turns, a step each, `--rounds` times after `--warmup` rounds that are not counted, so whatever
else the machine does falls on all of them. A ratio is the median of the rounds' own ratios, with the quartiles beside
it; where these lie on both sides of 1, no ratio is claimed.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.utils.peft_types import PeftType
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import iapt
from iapt.data.batch import Batch, Encoded, collate
from iapt.model.adapted import AdaptedModel
from iapt.model.mixture import RowMixture

SHAPES: dict[str, dict[str, int]] = {
    "llama_43m": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 16384,
    },
    "llama32_3b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "llama2_7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
}  # fmt: skip
RANK = 16
METHODS: dict[str, dict[str, Any]] = {
    "iapt, after the instruction": {"name": "iapt", "position": "after_instruction"},
    "iapt, before the instruction": {"name": "iapt", "position": "before_instruction"},
    "prompt_tuning": {"name": "prompt_tuning", "init": "random"},
    "lora": {"name": "lora", "kind": "peft", "type": "LORA", "options": {"r": RANK}},
}
Step = Callable[[], Any]


@dataclass
class Rival:
    """What takes its turn, and what was seen of it."""

    name: str
    step: Step
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    flops: int | None = None


def main() -> None:
    """Measure, print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "decode"])
    parser.add_argument("--shape", default="llama_43m", help=f"{', '.join(SHAPES)}, or a folder with a model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--instruction", type=int, default=112, help="tokens, without padding")
    parser.add_argument("--response", type=int, default=8, help="tokens to train on, or to decode")
    parser.add_argument("--adapters", type=int, default=8, help="of a mixed batch, for decode")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    lm = build(options.shape, getattr(torch, options.dtype), options.device)
    rivals, peer = (training if options.what == "train" else decoding)(lm, options)
    measure(rivals, options)
    found = rows(rivals, peer, ceiling(lm) if options.what == "train" else None)
    report = {
        "command": vars(options) | {"json": None},
        "machine": machine(lm.device),
        "parameters": sum(p.numel() for p in lm.parameters()),
        "rows": found,
        "measured": [asdict(r) | {"step": None} for r in rivals],
    }
    show(found, f"{options.what}: {options.shape}, {options.dtype}, batch {options.batch}, "
         f"{options.instruction} + {options.response} tokens; {report['machine']}")  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


def build(shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A frozen model with random weights, or a folder's."""
    if shape not in SHAPES:
        lm = AutoModelForCausalLM.from_pretrained(shape, dtype=dtype).to(device)
    else:
        config = AutoConfig.for_model("llama", **SHAPES[shape], max_position_embeddings=4096)
        with torch.device(device):
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return lm.eval().requires_grad_(False)


def twin(lm: PreTrainedModel) -> PreTrainedModel:
    """The same model once more over the same tensors, for those who put layers of their own into it."""
    shared = {id(t): t for t in (*lm.parameters(), *lm.buffers())}
    return copy.deepcopy(lm, memo=shared)


def inputs(lm: PreTrainedModel, options: argparse.Namespace) -> Batch:
    """Random texts of full length: nothing of what is timed is padding."""
    size, generator = lm.config.get_text_config().vocab_size, torch.Generator().manual_seed(1)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, size, (length,), generator=generator).tolist())

    texts = [Encoded(i, draw(options.instruction), draw(options.response), ()) for i in range(options.batch)]
    return collate(texts, 0).to(lm.device)


# -- who takes part ---------------------------------------------------------------------------------------------


def training(lm: PreTrainedModel, options: argparse.Namespace) -> tuple[list[Rival], str]:
    """Forward, loss, backward and optimiser of every method and of peft's; forward and loss of the bare backbone."""
    batch = inputs(lm, options)
    whole = torch.cat([batch.instruction_ids, batch.response_ids], 1)
    labels = whole.masked_fill(torch.arange(whole.shape[1], device=lm.device) < options.instruction, -100)

    def theirs(model: Any) -> Step:
        return _stepper(lambda: model(input_ids=whole, labels=labels).loss, model.parameters())

    @torch.no_grad()
    def bare() -> None:
        lm(input_ids=whole, labels=labels)

    rivals = [Rival("bare backbone, forward alone", bare)]
    rivals += [Rival(f"peft: {kind}", theirs(_peft(twin(lm), kind))) for kind in ("LoRA", "prompt tuning")]
    for name, settings in METHODS.items():
        model = iapt.attach(twin(lm), settings, preflight=False)
        model.train()
        rivals.append(Rival(name, _stepper(lambda m=model: m.loss(batch), model.trainable().values())))  # type: ignore[misc]
    return rivals, "peft: LoRA"


def _stepper(loss: Callable[[], Tensor], parameters: Any) -> Step:
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(lm: PreTrainedModel, options: argparse.Namespace) -> tuple[list[Rival], str]:
    """Greedy decoding of the bare backbone, of one adapter and of several mixed in a batch."""
    batch, number = inputs(lm, options), options.adapters
    length = {"max_new_tokens": options.response, "min_new_tokens": options.response, "do_sample": False}
    ids = {"input_ids": batch.instruction_ids, "attention_mask": batch.instruction_mask.long(), "pad_token_id": 0}
    served = [i % number for i in range(options.batch)]
    lora = _peft(twin(lm), "LoRA").eval()
    for index in range(1, number):
        lora.add_adapter(f"a{index}", lora.peft_config["default"])
    names = ["default" if i == 0 else f"a{i}" for i in served]
    own = {n: iapt.attach(lm, METHODS[n], preflight=False) for n in list(METHODS)[:2]}
    first = next(iter(own.values()))
    adapters = [iapt.attach(lm, next(iter(METHODS.values())), preflight=False).method for _ in range(number)]
    mixed = RowMixture(adapters)  # type: ignore[arg-type]
    mixture = AdaptedModel(first.backbone, mixed, precision="bf16" if lm.dtype == torch.bfloat16 else "fp32")

    def together() -> None:
        with mixed.serving(served):
            mixture.generate(batch, **length)

    rivals = [
        Rival("bare backbone", lambda: lm.generate(**ids, **length)),
        Rival("peft: LoRA", lambda: lora.generate(**ids, **length)),
        Rival(f"peft: {number} LoRAs mixed", lambda: lora.generate(**ids, **length, adapter_names=names)),
        *(Rival(name, lambda m=model: m.generate(batch, **length)) for name, model in own.items()),  # type: ignore[misc]
        Rival(f"{number} iapt adapters mixed, after the instruction", together),
    ]
    return rivals, "bare backbone"


def _peft(lm: PreTrainedModel, kind: str) -> Any:
    if kind == "LoRA":
        config: Any = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        config = peft.PromptTuningConfig(num_virtual_tokens=10, task_type="CAUSAL_LM")
    assert config.peft_type in (PeftType.LORA, PeftType.PROMPT_TUNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(lm, config)


# -- measuring --------------------------------------------------------------------------------------------------


def measure(rivals: list[Rival], options: argparse.Namespace) -> None:
    """Everyone's turns, in an order that is reversed from round to round."""
    cuda = options.device.startswith("cuda")
    for number in range(options.warmup + options.rounds):
        for rival in rivals if number % 2 else reversed(rivals):
            counting = number == 0 and options.what == "train"
            counter = FlopCounterMode(display=False) if counting else None
            context: AbstractContextManager[Any] = counter or nullcontext()
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            try:
                with context:
                    rival.step()
            except AssertionError:  # torch 2.11's counter does not know grouped queries
                counter = None
            if cuda:
                torch.cuda.synchronize()
                rival.peak_bytes = torch.cuda.max_memory_allocated()
            if number >= options.warmup:
                rival.seconds.append(time.perf_counter() - start)
            if counter is not None:
                rival.flops = counter.get_total_flops()
            print(f"\rround {number + 1} of {options.warmup + options.rounds}: {rival.name:<50}", end="", flush=True)
    print("\r" + " " * 80 + "\r", end="")


def ceiling(lm: PreTrainedModel) -> float:
    """Floating-point operations a second of a large matrix product in the model's dtype, the best of ten."""
    n = 8192 if lm.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=lm.device, dtype=lm.dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return float(2 * n**3 / best)


def rows(rivals: list[Rival], peer: str, ceiling: float | None) -> list[dict[str, Any]]:
    """What the table shows of each."""
    against = next(r for r in rivals if r.name == peer)
    found = []
    for rival in rivals:
        ratios = sorted(a / b for a, b in zip(rival.seconds, against.seconds, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        row: dict[str, Any] = {
            "method": rival.name,
            "milliseconds": round(1000 * statistics.median(rival.seconds), 1),
            f"ratio to {peer}": "1" if rival is against else _ratio(low, middle, high),
        }
        if rival.peak_bytes is not None:
            row["peak GiB"] = round(rival.peak_bytes / 2**30, 2)
        if rival.flops and ceiling:
            row["TFLOP"] = float(f"{rival.flops / 1e12:.3g}")
            row["time over the floor"] = round(statistics.median(rival.seconds) / (rival.flops / ceiling), 2)
        found.append(row)
    return found


def _ratio(low: float, middle: float, high: float) -> str:
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if low > 1 or high < 1 else f"about 1 ({low:.2f} to {high:.2f})"


def machine(device: torch.device) -> str:
    """What a figure is worth nothing without."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, Python {platform.python_version()}"
    )


def show(found: list[dict[str, Any]], title: str) -> None:
    """Print a table in Markdown, which documents can take as it is."""
    table = Table(*found[0], title=title, title_justify="left")
    for row in found:
        table.add_row(*map(str, row.values()))
    Console(width=160).print(table)
    print("\n" + title + "\n")
    print("| " + " | ".join(found[0]) + " |\n|" + "---|" * len(found[0]))
    for row in found:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
