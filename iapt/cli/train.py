"""`iapt-train`: compose a configuration, train an adapter, evaluate it, print the table.

iapt-train                                             # the embedded default, no network
iapt-train task=glue/rte method=lora backbone=hf backbone.path=FOLDER
iapt-train -m method=prompt_tuning,idpg,lora,iapt seed=1,2,3
iapt-train --help                                      # every group and its options
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from iapt.cli.app import run_command
from iapt.errors import ConfigError


def main() -> None:
    """Entry point of `iapt-train`."""
    run_command("train", _job, _problems)


def _job(composed: DictConfig, folder: Path, in_sweep: bool) -> dict[str, Any]:
    from iapt.config import load_config  # after Hydra: --cfg, --help and completion need no torch
    from iapt.launch import launch

    return launch(load_config(composed), folder, own_process=in_sweep)


def _problems(composed: DictConfig) -> list[str]:
    from iapt.config import load_config

    try:
        load_config(composed)
    except ConfigError as error:
        return error.problems
    return []


if __name__ == "__main__":
    main()
