"""Hyper-parameter search: Optuna proposes the cells of a sweep, and is told their dev value, never the test's.

iapt-train -m hydra/sweeper=search hydra.sweeper.trials=20 hydra.sweep.dir=DIR
    'trainer.learning_rate=tag(log, interval(1e-4, 1e-2))' 'method.bottleneck=int(interval(8, 64))'

Started again in the same directory it goes on: what was proposed stands in DIR/search.log, and trials that were
interrupted are proposed again with the same values, so that their cells are continued. The plugin of Hydra's own
project is bound to an Optuna of 2022. Hydra imports every plugin at each start, so nothing heavy is imported above.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class SearchConf:
    """`hydra.sweeper` of a search."""

    _target_: str = "hydra_plugins.iapt_search.search.Search"
    trials: int = 20  # in all, those of earlier starts among them
    at_once: int = 1  # proposed together: as many as the launcher runs at a time
    seed: int = 1  # of the proposals


ConfigStore.instance().store(group="hydra/sweeper", name="search", node=SearchConf, provider="iapt")


class Search(Sweeper):  # type: ignore[misc]
    """Asks Optuna's TPE sampler for the values of all swept settings, runs them, and tells it their dev value.

    Raises (in `sweep`):
        UserError: Optuna is not installed, nothing to search over, or the directory holds another search.
    """

    def __init__(self, trials: int, at_once: int, seed: int) -> None:
        self.trials, self.at_once, self.seed = trials, at_once, seed

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run trials until there are `trials` that ended, well or not; the best trial's values and dev value."""
        from iapt.config.errors import ConfigError, UserError

        try:
            import optuna
        except ImportError:
            raise UserError("hydra/sweeper = search: needs optuna; pip install 'iapt[search]'") from None
        wrong = [key for key in ("trials", "at_once") if getattr(self, key) < 1]
        if wrong:
            raise ConfigError([f"hydra.sweeper.{key} = {getattr(self, key)}: must be at least 1" for key in wrong])
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(arguments)
        fixed = [
            f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in overrides if not o.is_sweep_override()
        ]
        space = {o.get_key_element(): _distribution(o) for o in overrides if o.is_sweep_override()}
        if not space:
            raise UserError("hydra/sweeper = search: nothing to search over; give key=a,b or key=interval(low,high)")

        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "search.log")))
        study = optuna.create_study(storage=storage, study_name="search", direction="maximize", load_if_exists=True)
        asked = {key: json.loads(optuna.distributions.distribution_to_json(d)) for key, d in space.items()}
        if study.user_attrs.get("space", asked) != asked:
            raise UserError(f"hydra.sweep.dir = {folder}: holds a search over other values; choose another")
        study.set_user_attr("space", asked)
        states = optuna.trial.TrialState
        for interrupted in study.get_trials(states=(states.RUNNING,)):
            study.enqueue_trial(interrupted.params)
            study.tell(interrupted.number, state=states.FAIL)
        # Another seed at each start: with the first one again, its random proposals would come again too.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))

        while (left := self.trials - _ended(study)) > 0:
            trials = [study.ask(space) for _ in range(min(left, self.at_once))]
            jobs = [[*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in trials]
            results = self.launcher.launch(jobs, initial_job_idx=trials[0].number)
            for trial, result in zip(trials, results, strict=True):
                value = float(result.return_value)
                trial.set_user_attr("ended", True)
                if math.isnan(value):  # the run failed
                    study.tell(trial, state=states.FAIL)
                else:
                    study.tell(trial, value)
        if not any(trial.state == states.COMPLETE for trial in study.trials):
            return None
        best = " ".join(f"{key}={value}" for key, value in study.best_params.items())
        print(f"best of {_ended(study)} trials: dev {study.best_value:.4f} with {best}")
        return study.best_params, study.best_value


def _ended(study: Any) -> int:
    """Trials whose run ended; one that was interrupted and proposed again does not count twice."""
    return sum("ended" in trial.user_attrs for trial in study.trials)


def _distribution(override: Override) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=log)
        return FloatDistribution(float(value.start), float(value.end), log=log)
    if isinstance(value, RangeSweep) and isinstance(value.step, int) and isinstance(value.start, int):
        return IntDistribution(value.start, int(value.stop) - 1, step=value.step)
    return CategoricalDistribution(list(override.sweep_string_iterator()))
