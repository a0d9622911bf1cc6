"""The commands as a user types them: what they run, what they print, and how every bad input ends."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.experimental.callback import Callback

from iapt.cli import callbacks, eval, train
from iapt.config.errors import TrainingError, UserError
from iapt.config.paths import CONFIG_DIR
from iapt.config.schema import Config
from iapt.folder.summary import Summary, write_summary
from tests.test_launch import contents
from tests.test_launch import stub as stub

RETURNED: list[Any] = []


class Probe(Callback):  # type: ignore[misc]
    """Sees what a job returns to a sweeper."""

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        RETURNED.append(job_return.return_value)


class Runs(list[tuple[Config, Path]]):
    """Every call of the experiment; `fail` decides which of them raise what."""

    fail: Callable[[Config], Exception | None] = staticmethod(lambda config: None)  # type: ignore[assignment]

    def run(self, config: Config, folder: Path) -> Summary:
        self.append((config, folder))
        error = self.fail(config)
        if error:
            raise error
        summary = Summary(
            task=config.task.name, method=config.method.name, seed=config.seed, metric="accuracy", zero_shot=0.5,
            dev=0.75, test=0.875, trainable_params=12345, train_seconds=61.0, status="ok",
        )  # fmt: skip
        write_summary(folder, summary)
        return summary


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    """An experiment that takes no time, in this process even where a sweep would start others."""
    calls = Runs()

    def in_child(config: Config, folder: Path) -> Summary:
        from iapt.runs.launch import record_failure, to_dict

        try:
            return calls.run(config, folder)
        except Exception as error:
            record_failure(folder, error, to_dict(config))
            raise

    monkeypatch.setattr("iapt.runs.experiment.run", calls.run)
    monkeypatch.setattr("iapt.runs.launch._run_in_child", in_child)
    monkeypatch.setattr(callbacks, "exit_code", 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return calls


LOADING = "loading torch and transformers"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: exit code, stdout, stderr without its first line, which is always there."""

    def call(*args: str, main: Callable[[], None] = train.main) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["iapt-train", *args])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines(keepends=True) if not line.endswith(f": {LOADING}\n")]
        return int(caught.value.code or 0), printed.out, "".join(errors)

    return call


Command = Callable[..., tuple[int, str, str]]


def test_no_argument_runs_the_embedded_default(runs: Runs, command: Command) -> None:
    code, out, err = command()
    [(config, folder)] = runs
    assert (code, err) == (0, "")
    assert (config.backbone.name, config.task.name, config.method.name) == ("tiny", "toy/entailment", "iapt")
    assert folder.relative_to(Path.cwd()).parts[:4] == ("outputs", "toy", "entailment", "iapt")
    assert sorted(contents(folder)) == ["config.yaml", "summary.json"]  # and nothing from Hydra
    [row] = [line for line in out.splitlines() if "toy/entailment" in line]
    scores = ["accuracy", "50.0", "75.0", "87.5", "12,345", "1:01", "ok"]
    assert row.split() == ["toy/entailment", "iapt", *scores, str(folder.relative_to(Path.cwd()))]


def test_the_first_line_comes_before_the_libraries(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from iapt.cli.train import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.startswith(f"iapt-train task=toy/entailment method=iapt backbone=tiny: {LOADING}\n")


def test_settings_reach_the_run_even_where_no_yaml_names_them(runs: Runs, command: Command) -> None:
    arguments = "task=glue/rte method=lora task.num_beams=3 trainer.max_steps=7 data_dir=data hydra.run.dir=here"
    code, _, err = command(*arguments.split())
    assert (code, err) == (0, "")
    [(config, folder)] = runs
    assert (config.task.num_beams, config.trainer.max_steps, config.method.name) == (3, 7, "lora")
    assert config.data_dir == str(Path.cwd() / "data")
    assert folder == Path.cwd() / "here"


BAD = {
    "unknown method": ("method=itap", ["method = itap", "did you mean 'iapt'?", "known: "]),
    "unknown task": ("task=glue/rta", ["task = glue/rta", "did you mean 'glue/rte'?", "toy/describe"]),
    "unknown task without its folder": ("task=rte", ["task = rte", "did you mean 'glue/rte'?"]),
    "unknown backbone": ("backbone=llama2_7", ["backbone = llama2_7", "'llama2_7b'", "gemma_2b"]),
    "unknown experiment": ("experiment=toy_compare", ["did you mean 'toy_comparison'?"]),
    "mistyped key": ("method.bottlneck=3", ["method.bottlneck = 3: unknown key; did you mean 'bottleneck'?"]),
    "mistyped key with +": (
        "+method.bottlneck=3",
        ["method.bottlneck = 3: unknown key; did you mean 'bottleneck'?"],
    ),
    "mistyped key with ++": ("++sed=3", ["sed = 3: unknown key; did you mean 'seed'?"]),
    "mistyped group": ("methd=lora", ["methd = 'lora': unknown key; did you mean 'method'?"]),
    "wrong type": ("trainer.max_steps=many", ["trainer.max_steps = 'many': expected int or null"]),
    "value for a group of settings": ("trainer=5", ["trainer = 5: expected a group of settings"]),
    "out of range": ("trainer.batch_size=0", ["trainer.batch_size = 0: must be at least 1"]),
    "backbone without a path": ("backbone=hf", ["backbone.path = null"]),
    "too many processes": ("hardware=cpu hardware.num_processes=4096", ["hardware.num_processes = 4096"]),
    "grammar": ("trainer.max_steps=[1", ["trainer.max_steps=[1", "not understood"]),
    "sweep without -m": ("method=iapt,lora", ["method=iapt,lora", "-m"]),
    "+ on a key that exists": ("+seed=3", ["seed=3"]),
    "+ on an experiment": ("+experiment=toy_comparison", ["  +experiment=toy_comparison: write experiment=toy_"]),
    "+ on a task": ("+task=glue/rte", ["  +task=glue/rte: write task=glue/rte\n"]),
    "+ on a method": ("+method=lora seed=x", ["2 problems", "  +method=lora: write method=lora\n", "seed = 'x'"]),
    "++ on a group": ("++method=lora", ["1 problem in", "  ++method=lora: write method=lora\n"]),
    "+ on a group of a sweep": ("-m +method=lora,iapt", ["1 problem in", "+method=lora,iapt: write method=lora,"]),
    "+ on a group of hydra": ("+hydra/launcher=basic", ["+hydra/launcher=basic: write hydra/launcher=basic"]),
    "no option": ("tracking=null", ["tracking = null: no such option; ~tracking leaves the group out; known: none, w"]),
    "no option in a sweep": ("-m debug=null,default", ["debug = null: no such option; ~debug leaves the group out"]),
    "nothing to delete": ("~trainer.lr", ["trainer.lr"]),
    "hydra's own settings": ("hydra.nothing=1", ["hydra.nothing"]),
    "several at once": (
        "method=itap method.bottlneck=3 +trainer.lr=1 seed=x",
        ["4 problems", "method = itap", "method.bottlneck", "trainer.lr", "seed = 'x'"],
    ),
    "sweep with a setting that one of its methods lacks": (
        "-m method=iapt,lora method.bottleneck=8",
        ["1 problem", "method.bottleneck = 8", "(in method=lora)"],
    ),
    "sweep over unknown options": ("-m method=iapt,lorra,idgp", ["method = lorra", "method = idgp"]),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_message_and_exit_code_2(
    runs: Runs, command: Command, arguments: str, words: list[str]
) -> None:
    code, out, err = command(*arguments.split())
    assert code == 2
    assert "Traceback" not in out + err
    for word in words:
        assert word in err
    assert err.count("in the configuration") <= 1
    assert not runs
    assert not [p for p in Path().rglob("*") if p.is_file() and p.name != "multirun.yaml"]
    assert not list(Path().glob("outputs/toy/*/*/*"))  # not even an empty run folder


def test_bad_input_that_the_run_finds(runs: Runs, command: Command) -> None:
    runs.fail = lambda config: UserError("data_dir = x: no such folder")  # type: ignore[method-assign,assignment]
    assert command() == (2, "", "data_dir = x: no such folder\n")


def test_a_failed_run_exits_with_1_and_a_bug_keeps_its_traceback(
    runs: Runs, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.fail = lambda config: TrainingError("the loss is nan")  # type: ignore[method-assign,assignment]
    assert command() == (1, "", "the loss is nan\n")
    for bug in (ZeroDivisionError, ValueError):  # Hydra raises the latter too
        runs.fail = lambda config: bug("a bug")  # type: ignore[method-assign,assignment]  # noqa: B023
        monkeypatch.setattr(sys, "argv", ["iapt-train"])
        with pytest.raises(bug, match="a bug"):
            train.main()
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_finished_folder_is_refused_and_left_as_it_was(runs: Runs, command: Command) -> None:
    assert command("hydra.run.dir=here")[0] == 0
    before = contents(Path("here"))
    code, _, err = command("hydra.run.dir=here", "seed=2")
    assert (code, err.count("\n")) == (2, 1)
    assert "already holds a finished run" in err
    assert contents(Path("here")) == before
    code, out, _ = command("hydra.run.dir=here", "resume=true")
    assert code == 0
    assert "87.5" in out
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("seed=3", "hydra.run.dir=some where"), "iapt-train seed=3 'hydra.run.dir=some where' resume=true"),
        (("task.num_beams=2", "hydra.run.dir=s"), "iapt-train task.num_beams=2 hydra.run.dir=s resume=true"),
        (("-m", "seed=3", "hydra.sweep.dir=s"), "iapt-train -m seed=3 hydra.sweep.dir=s resume=true"),
    ],
)
def test_an_interrupted_run_says_how_to_continue(
    runs: Runs, command: Command, arguments: tuple[str, ...], expected: str
) -> None:
    def interrupt(config: Config) -> Exception | None:
        raise KeyboardInterrupt

    runs.fail = interrupt  # type: ignore[method-assign,assignment]
    code, _, err = command(*arguments)
    assert code == 130
    assert err.strip().splitlines()[-1].strip() == expected


@pytest.mark.parametrize(("error", "exit_code"), [(TrainingError("nan loss"), 1), (UserError("no column"), 2)])
def test_a_sweep_goes_on_after_a_failure_and_ends_in_one_table(
    runs: Runs, command: Command, error: Exception, exit_code: int
) -> None:
    runs.fail = lambda config: error if config.method.name == "idpg" else None  # type: ignore[method-assign,assignment]
    code, out, _ = command("-m", "method=idpg,lora,iapt", "hydra.sweep.dir=sweep")
    assert code == exit_code
    assert [config.method.name for config, _ in runs] == ["idpg", "lora", "iapt"]
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("toy/entailment")]
    assert [(row[1], row[-1]) for row in rows] == [
        ("lora", "sweep/1"),
        ("iapt", "sweep/2"),
        ("idpg", "sweep/0"),  # failed, so last
    ]
    assert " ".join(rows[2]).endswith(f"failed {error} sweep/0")
    assert out.count("zero-shot") == 1
    assert "2 of 3 runs finished" in out
    failed = json.loads(Path("sweep/0/summary.json").read_text())
    assert (failed["status"], failed["reason"], failed["method"]) == ("failed", str(error), "idpg")

    # The same sweep again: what is done stays, what failed runs.
    runs.fail = lambda config: None  # type: ignore[method-assign,assignment]
    callbacks.exit_code = 0
    before = contents(Path("sweep/1"))
    code, out, _ = command("-m", "method=idpg,lora,iapt", "hydra.sweep.dir=sweep", "resume=true")
    assert code == 0
    assert "3 of 3 runs finished" in out
    assert len(runs) == 4
    assert contents(Path("sweep/1")) == before


@pytest.mark.full
def test_a_glob_runs_every_method(runs: Runs, command: Command) -> None:
    """All but those that need another run's folder."""
    code, out, _ = command("-m", "method=glob(*, exclude=[panda, post])", "hydra.sweep.dir=sweep")
    names = sorted({path.stem for path in (CONFIG_DIR / "method").glob("*.yaml")} - {"panda", "post"})
    assert code == 0
    assert sorted(config.method.name for config, _ in runs) == names
    assert f"{len(names)} of {len(names)} runs finished" in out


def test_bad_input_of_one_job_is_a_row_of_the_table(runs: Runs, command: Command) -> None:
    code, out, _ = command("-m", "trainer.batch_size=0,16", "hydra.sweep.dir=sweep", "seed=1,2")
    assert code == 2
    assert out.count("trainer.batch_size = 0: must be at least 1") == 2
    assert len(runs) == 2
    [header] = [line for line in out.splitlines() if "zero-shot" in line]
    assert "seed" in header.split()


def test_a_job_returns_the_dev_metric_to_the_sweeper(runs: Runs, command: Command) -> None:
    RETURNED.clear()
    runs.fail = lambda config: TrainingError("x") if config.seed == 2 else None  # type: ignore[method-assign,assignment]
    command("-m", "seed=1,2", "hydra.sweep.dir=sweep", "+hydra.callbacks.probe._target_=tests.test_cli.Probe")
    assert RETURNED[0] == 0.75
    assert RETURNED[1] != RETURNED[1]  # nan: a sweeper must not mistake a failure for a score


def test_eval_lays_what_is_given_over_the_checkpoint(
    runs: Runs, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def evaluate(*args: Any) -> Summary:
        calls.append(args)
        return Summary(task="t", method="iapt", metric="accuracy", test=0.5, status="ok")

    monkeypatch.setattr("iapt.runs.experiment.evaluate", evaluate)
    code, out, err = command("checkpoint=run", "hydra.run.dir=here", main=eval.main)
    assert (code, err) == (0, "")
    assert "50.0" in out
    command("checkpoint=run", "split=dev", "data_dir=data", "task.num_beams=2", "hardware=cpu", main=eval.main)
    here = Path.cwd()
    assert calls[0] == (here / "run", here / "here", {}, "test")
    checkpoint, _, overrides, split = calls[1]
    assert (checkpoint, split, overrides["data_dir"]) == (here / "run", "dev", str(here / "data"))
    assert overrides["task"] == {"num_beams": 2}
    assert overrides["hardware"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("", "checkpoint: missing"),
        ("checkpoint=x splt=dev", "did you mean 'split'?"),
        ("checkpoint=x +trainer.eval_batchsize=2", "did you mean 'eval_batch_size'?"),
        ("checkpoint=x task=glue/rta", "did you mean 'glue/rte'?"),
        ("checkpoint=x +task=glue/rte", "  +task=glue/rte: write task=glue/rte\n"),
        ("checkpoint=x ++method=lora", "  ++method=lora: write +method=lora\n"),  # which eval has no option of
    ],
)
def test_bad_input_of_eval(runs: Runs, command: Command, arguments: str, word: str) -> None:
    code, out, err = command(*arguments.split(), main=eval.main)
    assert code == 2
    assert word in err
    assert "Traceback" not in out + err


def test_looking_at_a_configuration_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from iapt.cli.train import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    outputs = {}
    for arguments in ("--cfg job", "--help", "-sc query=bash", "--info searchpath", "--info"):
        env = {**os.environ, "COMP_LINE": "iapt-train method=", "COMP_POINT": "18"}
        command = [sys.executable, "-c", code, *arguments.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert (done.returncode, done.stderr.strip()) == (0, "False")
        outputs[arguments] = done.stdout
    assert "num_soft_tokens: 4" in outputs["--cfg job"]
    assert "toy" in outputs["--help"]
    assert "method=lora" in outputs["-sc query=bash"].split()
    assert "configs" in outputs["--info searchpath"]
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_a_sweep_for_real_has_a_process_per_job(tmp_path: Path, stub: Callable[[str], None]) -> None:
    stub("bad method")
    command = [sys.executable, "-m", "iapt.cli.train", "-m", "method=lora,iapt", "hydra.sweep.dir=sweep"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("toy/entailment")]
    assert [row[1] for row in rows] == ["iapt", "lora"]
    assert "the loss is nan" in " ".join(rows[1])
    pids = [json.loads((tmp_path / "sweep" / str(job) / "rank-.json").read_text())["pid"] for job in (0, 1)]
    assert len(set(pids)) == 2
    assert "Traceback" not in done.stderr
