"""What this machine has, and a clear word when a configuration asks for more."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

from iapt.config.errors import ConfigError
from iapt.config.schema import Config


def check_hardware(config: Config) -> None:
    """Refuse what this machine cannot do, all of it at once.

    Raises:
        ConfigError: naming key, value and what there is.
    """
    hardware, found = config.hardware, []
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_gpu = hardware.device == "cuda" or (hardware.device == "auto" and gpus > 0)
    if hardware.device == "cuda" and not gpus:
        found.append("hardware.device = cuda: no GPU that torch can use is here; take hardware=cpu")
    elif on_gpu and hardware.num_processes > gpus:
        found.append(f"hardware.num_processes = {hardware.num_processes}: this machine has {gpus} GPU(s)")
    elif not on_gpu and hardware.num_processes > cores():
        found.append(f"hardware.num_processes = {hardware.num_processes}: this machine has {cores()} core(s)")
    bf16 = hardware.precision == "bf16" or config.backbone.dtype == "bfloat16"
    if bf16 and on_gpu and gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
        key = "hardware.precision = bf16" if hardware.precision == "bf16" else "backbone.dtype = bfloat16"
        found.append(f"{key}: {torch.cuda.get_device_name()} has no bf16; take fp32")
    if hardware.attention.startswith("flash"):
        from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

        key, second = f"hardware.attention = {hardware.attention}", hardware.attention.endswith("2")
        if not (is_flash_attn_2_available() if second else is_flash_attn_3_available()):
            found.append(f"{key}: its package is not installed; sdpa and eager are there")
        if not (on_gpu and bf16):
            found.append(f"{key}: needs a GPU and hardware.precision = bf16")
    if config.backbone.quantization != "none":
        key = f"backbone.quantization = {config.backbone.quantization}"
        if importlib.util.find_spec("bitsandbytes") is None:
            found.append(f"{key}: bitsandbytes is not installed; pip install 'iapt[quantized]'")
        if not gpus:
            found.append(f"{key}: needs a GPU, and torch sees none here")
    if found:
        raise ConfigError(found)


def cores() -> int:
    """The CPU cores this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
