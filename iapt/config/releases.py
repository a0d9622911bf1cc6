"""Are the libraries that this package is made on among the releases it was tested with?

What was tested is the range that the package's own metadata asks for, so it stands in pyproject.toml alone. pip keeps
to it; whoever upgrades one library by hand, or installs another package that does, leaves it without a word.
"""

from __future__ import annotations

import functools
import importlib.metadata
import operator
import warnings

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from iapt.config.errors import UserError

# Those whose inner workings decide what is computed.
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets")


def tested(name: str) -> SpecifierSet:
    """The versions of one library that were tested; any version where the package's metadata is not to be found."""
    # An extra that includes another one repeats its requirements.
    return functools.reduce(operator.and_, (r.specifier for r in _required() if r.name == name), SpecifierSet())


@functools.cache
def _required() -> list[Requirement]:
    try:
        return [Requirement(line) for line in importlib.metadata.requires("iapt") or ()]
    except importlib.metadata.PackageNotFoundError:  # a source tree that nobody installed
        return []


def beyond_tested(*names: str) -> str:
    """One line on the libraries that are newer than what was tested; empty if none is.

    Args:
        names: the libraries; `LIBRARIES` if none is given. One that is not installed is passed over.

    Raises:
        UserError: a library is older than what works, or of a release known not to work.
    """
    newer: list[tuple[str, str]] = []
    unfit: list[tuple[str, str]] = []
    for name in names or LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        broken = {s.operator for s in tested(name) if not s.contains(version, prereleases=True)}
        if broken:
            (newer if broken <= {"<", "<="} else unfit).append((name, version))
    if unfit:
        raise UserError(f"{_say(unfit)}: iapt does not work with it; {_remedy(unfit)}")
    return f"{_say(newer)}: newer than tested, results may be wrong; {_remedy(newer)}" if newer else ""


@functools.cache
def warn_once() -> None:
    """Warn, once in a process, of what `beyond_tested` says. Raises UserError as it does."""
    said = beyond_tested()
    if said:
        warnings.warn(said, stacklevel=3)  # for whoever wrote iapt.attach


def _say(found: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {version} (tested: {_range(name)})" for name, version in found)


def _remedy(found: list[tuple[str, str]]) -> str:
    wanted = " ".join(f"'{name}{_range(name)}'" for name, _ in found)
    return f"pip install {wanted}"


def _range(name: str) -> str:
    """Lower bound first; a SpecifierSet has no order of its own."""
    return ",".join(sorted({str(s) for s in tested(name)}, reverse=True))
