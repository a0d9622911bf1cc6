"""The methods, one file each. Importing this package registers them all, in `iapt.methods.registry`."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
