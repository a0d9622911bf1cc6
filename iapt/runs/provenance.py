"""Under what circumstances a result came about: machine, memory, versions, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


def circumstances(accelerator: Accelerator) -> dict[str, Any]:
    """The fields of a `Summary` that say where it came about: memory, device, processes, versions and commit."""
    device = accelerator.device
    if device.type == "cuda":
        peak, name = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_name(device)
    else:
        # Kilobytes everywhere but on macOS.
        unit = 1 if platform.system() == "Darwin" else 1024
        peak, name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, platform.machine()
    packages = ("iapt", "torch", "transformers", "peft", "accelerate", "datasets")
    return {
        "peak_memory_bytes": peak,
        "device": name,
        "device_type": device.type,
        "num_processes": accelerator.num_processes,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "git": _git(),
    }


def _git() -> str | None:
    """The commit of the checkout this package runs from, `-dirty` behind it if it has changes."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
