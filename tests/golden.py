"""Loss curves of 20 steps as they were: what `tests/golden.json` holds, and how it is made anew.

    python -m tests.golden        # after a change that is meant to change what is trained

Six methods, one for each road into the backbone, as the command line's defaults set them up, on the embedded backbone
and task. Only their learning rates are lower: at iapt's own 20 steps make a difference of 7e-4 out of the last bit that
another processor rounds otherwise, at these one below 1e-5.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir

from iapt.config.paths import CONFIG_DIR
from iapt.folder.files import whole_rows
from iapt.folder.names import METRICS as METRICS_FILE
from iapt.methods.settings import load_config
from iapt.runs import experiment

FILE = Path(__file__).with_suffix(".json")
METHODS = {"prompt_tuning": 1e-2, "prefix_tuning": 1e-2, "idpg": 1e-3, "iapt": 1e-3, "lora": 1e-3, "houlsby": 1e-3}
SETTINGS = (
    "trainer.max_steps=20", "trainer.eval_every=5", "trainer.log_every=1", "trainer.batch_size=16", "hardware=cpu",
    "++task.max_train_examples=200", "++task.max_eval_examples=40", "zero_shot=false", "preflight=off",
)  # fmt: skip


def curve(method: str) -> dict[str, list[float]]:
    """Which loss -> its values in the order of the steps."""
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        config = load_config(
            compose("train", overrides=[f"method={method}", f"trainer.learning_rate={METHODS[method]}", *SETTINGS])
        )
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        experiment.run(config, Path(folder))
        for record in whole_rows(Path(folder) / METRICS_FILE):
            for key, value in record.items():
                if key.endswith("loss"):
                    found.setdefault(key, []).append(value)
    return found


if __name__ == "__main__":
    rounded = {m: {k: [round(v, 6) for v in values] for k, values in curve(m).items()} for m in METHODS}
    FILE.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
