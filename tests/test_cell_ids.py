"""A cell of yesterday's sweep is found again: the ids that shipped settings had are the ones they have.

python -m tests.test_cell_ids        # writes cell_ids.json anew, which makes every old sweep run again: say so
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from iapt.config.paths import CONFIG_DIR
from iapt.methods.settings import load_config
from iapt.runs.sweep import cell_id

PINNED = Path(__file__).parent / "cell_ids.json"
IDS: dict[str, str] = json.loads(PINNED.read_text()) if PINNED.exists() else {}
NEEDS = {"method=panda": "method.init_from=x", "method=post": "method.source=x", "backbone=hf": "backbone.path=x"}


def shipped() -> list[str]:
    """One override for each YAML of a group that decides what a cell is."""
    return [
        f"{group}={path.relative_to(CONFIG_DIR / group).with_suffix('')}"
        for group in ("backbone", "hardware", "method", "task", "tracking")
        for path in sorted((CONFIG_DIR / group).rglob("*.yaml"))
    ]


def identify(override: str) -> str:
    overrides = [override, *([NEEDS[override]] if override in NEEDS else [])]
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        return cell_id(load_config(compose("train", overrides=overrides)))


@pytest.mark.parametrize("override", shipped())
def test_shipped_settings_keep_their_cells(override: str) -> None:
    assert identify(override) == IDS[override]


if __name__ == "__main__":
    PINNED.write_text(json.dumps({override: identify(override) for override in shipped()}, indent=1) + "\n")
