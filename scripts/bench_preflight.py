"""What a preflight costs: its seconds over those of one training step, on the model of a command line.

python scripts/bench_preflight.py                                            # the embedded default
python scripts/bench_preflight.py backbone=hf backbone.path=FOLDER method=lora hardware=gpu

The arguments are those of `iapt-train`. A step is one batch forward and backward, and AdamW. Medians of --repeats, in
which both take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from hydra import compose, initialize_config_dir

from iapt import preflight
from iapt.config.errors import UserError
from iapt.config.paths import CONFIG_DIR
from iapt.data.batch import collate
from iapt.methods.settings import load_config
from iapt.runs.experiment import build
from iapt.training.phases import protocol_batch_size


def main() -> None:
    """Print the ratio and what it is made of as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose("train", options.overrides)
    try:
        parts = build(load_config(composed), to_train=True)
        config, model, train = parts.config, parts.model, parts.items["train"]
        size = config.trainer.batch_size or protocol_batch_size(len(train))
        batch = collate(train[:size], parts.backbone.pad_id).to(model.lm.device)
        if not model.trainable():
            raise UserError(f"method = {config.method.name}: trains nothing, so there is no step to take")
        optimizer = torch.optim.AdamW(model.trainable().values())

        def step() -> None:
            model.train()
            model.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        def probe() -> None:
            preflight.check(model, config.method.name)

        pairs = [(_seconds(probe), _seconds(step)) for _ in range(options.repeats + 1)][1:]  # the first warms up
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    probed, stepped = map(statistics.median, zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    figures = {"preflight_seconds": probed, "step_seconds": stepped, "ratio": ratio}
    names = {"backbone": config.backbone.name, "method": config.method.name, "device": model.lm.device.type}
    print(json.dumps({**names, "batch": len(batch), **{key: float(f"{v:.3g}") for key, v in figures.items()}}))


def _seconds(what: Callable[[], None]) -> float:
    _wait()
    start = time.perf_counter()
    what()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
