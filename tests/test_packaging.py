"""The wheel, installed where no checkout is: the configs come along, and users' own join them."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from iapt.config.paths import CONFIG_DIR

ROOT = Path(__file__).parent.parent

MINE = """# A task of my own.
name: mine
source:
  path: someone/some-data
template: "Question: {question} Answer:"
response: "{answer}"
metrics: [bleu]
"""


def run(*command: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel and borrows only its dependencies."""
    env = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=env)
    python = env / "bin" / "python"
    [site] = env.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but the .pth files in it (an editable checkout) are not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ("install", "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=env)
    return python.parent


def test_the_wheel_carries_every_config_and_nothing_private(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = {p.relative_to(CONFIG_DIR).as_posix() for p in CONFIG_DIR.rglob("*.yaml") if "local" not in p.parts}
    packed = {n.removeprefix("iapt/configs/") for n in names if n.startswith("iapt/configs/")}
    assert len(expected) > 20
    assert {name for name in packed if not name.startswith("local/")} == expected
    assert not [n for n in names if n.startswith(("tests/", "scripts/"))]
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_command_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import iapt; print(iapt.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(installed.parent)
    printed = run(installed / "iapt-train", "--cfg", "job", "method=lora", cwd=tmp_path).stdout
    assert "name: toy/entailment" in printed
    assert "type: LORA" in printed
    assert "checkpoint" in run(installed / "iapt-eval", "--cfg", "job", cwd=tmp_path).stdout


def test_users_add_their_own_configs_by_searchpath(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "task").mkdir(parents=True)
    (tmp_path / "mine" / "task" / "mine.yaml").write_text(MINE)
    path = f"hydra.searchpath=[file://{tmp_path / 'mine'}]"
    printed = run(installed / "iapt-train", "--cfg", "job", "--resolve", path, "task=mine", cwd=tmp_path).stdout
    assert "path: someone/some-data" in printed
    assert "max_steps: null" in printed
    refused = run(installed / "iapt-train", path, "task=mime", cwd=tmp_path, code=2).stderr
    assert "task = mime: no such option; did you mean 'mine'?" in refused
