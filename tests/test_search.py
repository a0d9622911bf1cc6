"""A search: what is proposed, what it is told, and that it goes on where it stopped."""

from pathlib import Path
from typing import Any

import pytest

from iapt.config.errors import TrainingError
from iapt.folder.summary import Summary, write_summary
from tests.test_cli import Command, Runs
from tests.test_cli import command as command
from tests.test_cli import runs as runs

pytest.importorskip("optuna", reason="needs iapt[search]")
SEARCH = ("-m", "hydra/sweeper=search", "hydra.sweep.dir=s", "method=iapt", "method.bottleneck=int(interval(8, 64))")
RATE = "trainer.learning_rate=tag(log, interval(1e-4, 1e-2))"


def values(runs: Runs) -> list[tuple[int, float]]:
    return [(config.method.bottleneck, config.trainer.learning_rate) for config, _ in runs]  # type: ignore[attr-defined]


def test_four_trials_by_their_dev_value(runs: Runs, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Any, folder: Path) -> Summary:
        summary = Runs.run(runs, config, folder)
        # Test would have it the other way round.
        summary.dev, summary.test = config.method.bottleneck / 100, 1 - config.method.bottleneck / 100
        write_summary(folder, summary)
        return summary

    monkeypatch.setattr("iapt.runs.launch._run_in_child", run)
    code, out, _ = command(*SEARCH, RATE, "hydra.sweeper.trials=4")
    assert code == 0
    assert "4 of 4 runs finished" in out
    tried = values(runs)
    assert len(set(tried)) == 4
    assert all(8 <= bottleneck <= 64 and 1e-4 <= rate <= 1e-2 for bottleneck, rate in tried)
    assert f"best of 4 trials: dev {max(tried)[0] / 100:.4f} with method.bottleneck={max(tried)[0]} " in out
    assert command(*SEARCH, RATE, "hydra.sweeper.trials=4")[0] == 0
    assert len(runs) == 4
    assert command(*SEARCH, RATE, "hydra.sweeper.trials=6")[0] == 0
    assert len(set(values(runs))) == 6


def test_an_interrupted_trial_is_proposed_again_and_a_failed_one_is_not(runs: Runs, command: Command) -> None:
    def interrupt(config: Any) -> Exception | None:
        if len(runs) == 3:
            raise KeyboardInterrupt
        return TrainingError("nan") if len(runs) == 1 else None

    runs.fail = interrupt  # type: ignore[method-assign]
    assert command(*SEARCH, RATE, "hydra.sweeper.trials=4")[0] == 130
    runs.fail = lambda config: None  # type: ignore[method-assign,assignment]
    assert command(*SEARCH, RATE, "hydra.sweeper.trials=4")[0] == 1
    tried = values(runs)
    assert tried[2] == tried[3]
    assert len(set(tried)) == 4
    assert len(list(Path("s").rglob("cell.json"))) == 4
    assert runs[2][1] == runs[3][1]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("hydra.sweeper.trials=0", RATE), "hydra.sweeper.trials = 0: must be at least 1"),
        (("hydra.sweeper.trials=2", "trainer.learning_rate=interval(1e-3, 1e-2)"), "holds a search over other values"),
    ],
)
def test_bad_input(runs: Runs, command: Command, arguments: tuple[str, ...], word: str) -> None:
    assert command(*SEARCH, RATE, "hydra.sweeper.trials=1")[0] == 0
    code, _, err = command(*SEARCH, *arguments)
    assert (code, word in err) == (2, True), err
    assert len(runs) == 1


def test_nothing_to_search_over(runs: Runs, command: Command) -> None:
    code, _, err = command("-m", "hydra/sweeper=search", "seed=1", "hydra.sweep.dir=s")
    assert (code, "nothing to search over" in err) == (2, True)
