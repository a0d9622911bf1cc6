"""The releases of the libraries: what is locked, what the ranges allow, and what is said outside of them."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import iapt
from iapt.config.errors import UserError
from iapt.config.releases import LIBRARIES, _required, beyond_tested, warn_once
from tests.test_cli import Command
from tests.test_cli import command as command

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = {
    r.name: r.specifier
    for r in map(Requirement, [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)])
    if r.name != "iapt"
}
RANGES = ["torch>=2.11,<2.14", "transformers>=5.17,<5.25", "peft>=0.21,<0.22,!=0.21.1"]
RANGES += [f"lm-eval<0.5; extra == '{extra}'" for extra in ("harness", "test")]


def lock(name: str) -> dict[str, list[Version]]:
    """Package -> its version, or its versions by platform and Python."""
    found: dict[str, list[Version]] = {}
    for package, version in re.findall(r"^([\w.-]+)==([^ ;\n]+)", (ROOT / name).read_text(), re.MULTILINE):
        found.setdefault(package, []).append(Version(version))
    return found


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What is installed, to be changed; the ranges are RANGES."""
    installed = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "peft": "0.21.0", "lm-eval": "0.4.13"}
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: RANGES)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed.get(name) or version(name))
    for cached in (warn_once, _required):
        cached.cache_clear()
    yield installed
    for cached in (warn_once, _required):
        cached.cache_clear()


def test_inside_the_ranges_nothing_is_said(libraries: dict[str, str], command: Command) -> None:
    for inside in ("5.17.0", "5.24.9"):
        libraries["transformers"] = inside
        assert beyond_tested() == ""
    assert command("--cfg", "job")[::2] == (0, "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert callable(iapt.attach)


@pytest.mark.parametrize("found", ["5.25.0", "5.25.0.dev0", "6.0.0rc1"])
def test_a_newer_release_is_named_in_one_line(libraries: dict[str, str], command: Command, found: str) -> None:
    libraries["transformers"] = found
    line = (
        f"transformers {found} (tested: >=5.17,<5.25): newer than tested, results may be wrong; "
        "pip install 'transformers>=5.17,<5.25'"
    )
    code, out, err = command("--cfg", "job")
    assert (code, err) == (0, line + "\n")
    assert "toy/entailment" in out
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert callable(iapt.attach)
        assert callable(iapt.load)
    assert [(str(w.message), w.filename) for w in caught] == [(line, __file__)]
    libraries["torch"] = "2.15.0"
    assert beyond_tested().startswith(f"torch 2.15.0 (tested: >=2.11,<2.14), transformers {found} (tested: ")


@pytest.mark.parametrize(("name", "found"), [("transformers", "5.16.1"), ("torch", "2.10.0+cu129"), ("peft", "0.21.1")])
def test_a_release_that_does_not_work_is_refused(
    libraries: dict[str, str], command: Command, tmp_path: Path, name: str, found: str
) -> None:
    libraries["transformers"] = "5.25.0"  # beside which another one may be merely untested
    libraries[name] = found
    code, out, err = command(f"hydra.run.dir={tmp_path / 'run'}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"{name} {found} (tested: >=")
    assert "does not work with it; pip install" in err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=f"{name} {re.escape(found)}"):
        iapt.attach  # noqa: B018


def test_the_ranges_are_read_once(libraries: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: read.append(name) or RANGES)  # type: ignore[func-returns-value]
    libraries["transformers"] = "5.25.0"
    assert beyond_tested() == beyond_tested() != ""
    assert read == ["iapt"]


def test_other_libraries_are_asked_for_by_name(libraries: dict[str, str]) -> None:
    libraries["lm-eval"] = "0.5.0"
    assert beyond_tested() == ""
    assert beyond_tested("lm-eval").startswith("lm-eval 0.5.0 (tested: <0.5)")


def test_the_ranges_are_those_of_the_installed_package() -> None:
    """Not a list of our own; an environment that was installed before the last change of a range is told so."""
    asked = {r.name: r.specifier for r in map(Requirement, importlib.metadata.requires("iapt") or ())}
    for name in LIBRARIES:
        assert asked[name] == REQUIRED[name], f"{name}: install again with make"


def test_ranges_end_at_what_is_locked() -> None:
    newest, oldest = lock("requirements.lock"), lock("requirements-oldest.lock")
    for name, specifier in REQUIRED.items():
        lower = [Version(s.version) for s in specifier if s.operator == ">="]
        upper = [Version(s.version) for s in specifier if s.operator == "<"]
        assert (len(lower), len(upper)) == (1, 1), f"{name}{specifier}: both ends, please"
        assert all(specifier.contains(v) for v in newest[name]), name
        if name in {*LIBRARIES, "lm-eval"}:  # where a minor release may change what is computed
            [locked] = newest[name]
            following = (*locked.release[:1], locked.release[1] + 1)
            if name == "lm-eval":  # whose minor releases are the third number
                following = (*locked.release[:2], locked.release[2] + 1)
            assert upper[0].release == following, f"{name}: {upper[0]} is not what follows on {locked}"
        if name in ("torch", "bitsandbytes"):  # the Makefile says why of the one; the other needs a GPU
            assert name not in oldest
        else:
            assert min(oldest[name]) == lower[0], name  # a later Python may need a later one


def test_the_locks_leave_the_build_of_torch_open() -> None:
    newest, oldest = lock("requirements.lock"), lock("requirements-oldest.lock")
    assert len(newest["torch"]) == 1
    assert not newest["torch"][0].local
    assert not [name for name in {*newest, *oldest} if name.startswith(("nvidia", "cuda", "triton"))]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("demo", "PIP_CONSTRAINT=requirements.lock .* -e .\n"),
        ("test", r"PIP_CONSTRAINT=requirements.lock .* -e '.\[test\]'"),
        ("test-oldest", r"PIP_CONSTRAINT=requirements-oldest.lock .* torch==2.\d+.\d -e '.\[test\]'"),
        ("test-oldest-fast", "-k '.*llama"),
        ("test-newest-fast", "PIP_CONSTRAINT=.venv-newest/requirements.lock "),
        ("lock", "pip compile .* --resolution lowest-direct"),
    ],
)
def test_make_installs_what_is_locked(tmp_path: Path, target: str, says: str) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-oldest.lock"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout), done.stdout


def test_the_default_demo_prints_no_warning(tmp_path: Path) -> None:
    """In a process of its own, because pytest keeps warnings to itself, and some come with the first import."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"} | {"PYTHONPATH": str(ROOT)}
    shorter = ("trainer.max_steps=2", f"hydra.run.dir={tmp_path}/run")
    line = [sys.executable, "-m", "iapt.cli.train", *shorter]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "iapt-train task=toy/entailment method=iapt backbone=tiny: loading torch and transformers"
    ]
    assert "step 2/2" in done.stdout
    assert "arning" not in done.stdout
