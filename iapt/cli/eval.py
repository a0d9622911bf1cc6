"""`iapt-eval`: score a checkpoint again, as its run did or on another split, task or data folder.

iapt-eval checkpoint=outputs/toy/entailment/iapt/...
iapt-eval checkpoint=RUN split=dev trainer.eval_batch_size=8
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from iapt.cli.app import run_command
from iapt.errors import ConfigError

OWN_KEYS = ("checkpoint", "split")


def main() -> None:
    """Entry point of `iapt-eval`."""
    run_command("eval", _job, _problems)


def _job(composed: DictConfig, folder: Path, in_sweep: bool) -> dict[str, Any]:
    from iapt import experiment

    problems = _problems(composed)
    if problems:
        raise ConfigError(problems)
    settings = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(settings, dict)
    overrides = {str(k): v for k, v in settings.items() if k not in OWN_KEYS and v is not None}
    if overrides.get("data_dir"):
        overrides["data_dir"] = str(Path(overrides["data_dir"]).expanduser().absolute())
    checkpoint = Path(settings["checkpoint"]).expanduser().absolute()
    return experiment.evaluate(checkpoint, folder, overrides, str(settings["split"]))


def _problems(composed: DictConfig) -> list[str]:
    """What can be said without the checkpoint's own config; the rest is checked once that is read."""
    from iapt.config import unknown_keys

    given = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(given, dict)
    problems = unknown_keys({str(k): v for k, v in given.items() if k not in OWN_KEYS}, also=OWN_KEYS)
    if OmegaConf.is_missing(composed, "checkpoint") or not composed.checkpoint:
        problems.insert(0, "checkpoint: missing; give checkpoint=RUN_FOLDER, or the folder of an adapter")
    return problems


if __name__ == "__main__":
    main()
