"""The README's picture of the package is the one that its imports are held to."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]


def test_the_picture_is_the_contract() -> None:
    picture = (ROOT / "README.md").read_text().split("| room | what it is |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", picture, re.MULTILINE) == LAYERS


def test_every_room_says_what_it_is_and_nothing_else_stands_in_the_root() -> None:
    found = {p.stem for p in (ROOT / "iapt").iterdir() if (p.suffix == ".py" or (p / "__init__.py").exists())}
    assert found - {"__init__"} == set(LAYERS)
    for room in LAYERS:
        file = ROOT / "iapt" / room / "__init__.py"
        first = (file if file.exists() else file.parent.with_suffix(".py")).read_text().splitlines()[0]
        assert first.startswith('"""'), room
        assert first.rstrip('"').endswith((".", ":")), room
