"""What is known about methods on an architecture: the shipped table `iapt/verified.json`, made by tests."""

from __future__ import annotations

import json
from pathlib import Path

VERIFIED = Path(__file__).parents[1] / "verified.json"


def known_there(model_type: str, method: str) -> str:
    """Return what the shipped table of tested methods says about an architecture."""
    table = json.loads(VERIFIED.read_text(encoding="utf-8")) if VERIFIED.is_file() else {}
    family = table.get("families", {}).get(model_type)
    if not family or not family.get("right"):
        return "no method was tested there"
    refused = family.get("refused", {}).get(method)
    why = f"it is known not to work there ({refused}); " if refused else ""
    return f"{why}known to be right there (transformers {table['transformers']}): {', '.join(family['right'])}"
