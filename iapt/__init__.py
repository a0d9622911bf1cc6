"""An experiment runner for parameter-efficient tuning of language models, with IAPT at its centre.

    import iapt
    model = iapt.attach(lm, {"name": "iapt", "bottleneck": 64}, tokenizer=tokenizer)

`attach`, `load` and `make_batch` are documented in `iapt.api`, `export_peft` and `import_peft` in `iapt.interop`.
Their first use warns of a library newer than what iapt was tested with, and raises UserError for one that is too old.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iapt.api import attach, load, make_batch
    from iapt.interop import export_peft, import_peft

__all__ = ["attach", "export_peft", "import_peft", "load", "make_batch"]


def __getattr__(name: str) -> Any:
    # On first use: the commands import this package too, and their --help must not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'iapt' has no attribute {name!r}")
    from iapt.config.releases import warn_once

    warn_once()  # before the libraries are imported: one that is too old may fail there
    return getattr(import_module("iapt.interop" if name.endswith("_peft") else "iapt.api"), name)
