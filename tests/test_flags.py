"""The flags of Hydra that show something, and those that do not go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from iapt.cli import eval, train
from tests.test_cli import Command, Runs
from tests.test_cli import command as command
from tests.test_cli import runs as runs

ONE_VALUE = "shows one configuration: leave -m out, and give every setting one value"


@pytest.mark.parametrize("main", [train.main, eval.main])
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("-m --cfg job", f"-m, --cfg: only one of them at a time; --cfg {ONE_VALUE}"),
        ("-m --cfg hydra method=lora,iapt", f"-m, --cfg: only one of them at a time; --cfg {ONE_VALUE}"),
        ("-m --info", f"-m, --info: only one of them at a time; --info {ONE_VALUE}"),
        ("--run --cfg job", "--run, --cfg: only one of them at a time"),
        ("-m --shell-completion query=bash", "-m, --shell-completion: only one of them at a time"),
        ("--shell-completion query=bash", "--shell-completion query=...: is asked by a shell"),
        ("--shell-completion nothing=bash", "Expecting one subcommand"),
        ("--shell-completion install=nothing", "No completion plugin for 'nothing'"),
        ("--resolve", "--resolve: only together with"),
        ("--cfg job --package nothing", "package 'nothing' not found"),
    ],
)
def test_what_hydra_cannot_show_is_one_message(
    runs: Runs,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    word: str,
    main: Callable[[], None],
) -> None:
    monkeypatch.delenv("COMP_LINE", raising=False)
    code, out, err = command(*arguments.split(), main=main)
    assert (code, out) == (2, "")
    assert err.startswith(word)
    assert "Traceback" not in err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("main", [train.main, eval.main])
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("--cfg job", "data_dir: "),
        ("--cfg hydra", "hydra:\n"),
        ("--cfg all --resolve", "hydra:\n"),
        ("--help", "== Configuration groups =="),
        ("-m --help", "== Configuration groups =="),
        ("--hydra-help", "== Flags =="),
        ("-m --hydra-help", "== Flags =="),
        ("--version", "Hydra 1"),
        ("--shell-completion install=bash", "complete"),
    ],
)
def test_what_hydra_shows(
    runs: Runs,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    word: str,
    main: Callable[[], None],
) -> None:
    monkeypatch.delenv("IAPT_DATA_DIR", raising=False)
    code, out, err = command(*arguments.split(), main=main)
    assert (code, err) == (0, "")
    assert word in out
    assert not list(Path().iterdir())
