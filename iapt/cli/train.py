"""`iapt-train`: compose a configuration, train an adapter, evaluate it, print the table.

iapt-train                                             # the embedded default, no network
iapt-train task=glue/rte method=lora backbone=hf backbone.path=FOLDER
iapt-train -m method=prompt_tuning,idpg,lora,iapt seed=1,2,3 hydra.sweep.dir=DIR       # again: only what is left
iapt-train -m ... hydra/launcher=joblib hydra.launcher.n_jobs=4                         # four runs at a time
iapt-train --help                                      # every group and its options
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from iapt.cli.app import loading, run_command
from iapt.config.errors import ConfigError
from iapt.folder.summary import Summary


def main() -> None:
    """Entry point of `iapt-train`."""
    run_command("train", _job, _problems, _cell)


def _job(composed: DictConfig, folder: Path, in_sweep: bool) -> Summary:
    if not in_sweep:  # whose view shows every cell
        chosen = HydraConfig.get().runtime.choices
        loading("iapt-train", " ".join(f"{g}={chosen[g]}" for g in ("task", "method", "backbone") if chosen.get(g)))
    from iapt.methods.settings import load_config  # after Hydra: --cfg, --help and completion need no torch
    from iapt.runs.launch import launch

    config = load_config(composed)
    if in_sweep:  # which runs a cell only if it is not settled, so whatever lies in its folder is to be continued
        config = dataclasses.replace(config, resume=True)
    return launch(config, folder, own_process=in_sweep)


def _cell(composed: DictConfig) -> str:
    from iapt.methods.settings import load_config
    from iapt.runs.launch import with_absolute_paths
    from iapt.runs.sweep import cell_id, hash_of

    try:
        return cell_id(with_absolute_paths(load_config(composed)))
    except ConfigError:  # a row of the sweep's table like any other
        settings = OmegaConf.to_container(composed, resolve=False)
        assert isinstance(settings, dict)
        return hash_of({str(key): value for key, value in settings.items()})


def _problems(composed: DictConfig) -> list[str]:
    from iapt.methods.settings import load_config

    try:
        load_config(composed)
    except ConfigError as error:
        return error.problems
    return []


if __name__ == "__main__":
    main()
