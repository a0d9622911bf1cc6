"""Say everything that is wrong with a command line at once, where Hydra stops at the first thing.

When Hydra refuses to compose, the command line is taken apart: unknown options of a group are named with what
exists; every other setting is forced into the configuration, so that the schema's own check sees all of it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from iapt.config.errors import suggest
from iapt.config.paths import CONFIG_DIR

Check = Callable[[DictConfig], list[str]]
MOST_JOBS = 64  # of a sweep that are looked into


def diagnose(args: argparse.Namespace, config_name: str, check: Check) -> tuple[list[str], list[str]]:
    """Find what is wrong with a command line.

    Args:
        args: as Hydra's own parser returns them.
        config_name: the primary config.
        check: returns the problems of a composed job configuration.

    Returns:
        The problems, and the overrides with every plain setting forced: what to run if there is no problem,
        because the schema knows keys that the composed YAML files leave at their defaults.
    """
    config_name = args.config_name or config_name
    problems: list[str] = []
    overrides = []
    for text in args.overrides:
        try:
            overrides.append(OverridesParser.create().parse_override(text))
        except HydraException as error:  # the grammar's errors, before Hydra dresses them up
            problems.append(f"{text}: not understood: {_first_line(error)}")
    loader = ConfigLoaderImpl(_search_path(args))
    texts = [o.input_line for o in overrides]
    _, repo = loader._parse_overrides_and_create_caching_repo(config_name, texts)
    chosen = loader.compute_defaults_list(config_name, [], RunMode.RUN).overrides.known_choices
    good = []
    for override in overrides:
        found = _option_problems(repo, override) + _added_problems(repo, override, chosen)
        found += _sweep_problems(override, args.multirun)
        problems += found
        if not found:
            good.append(override)
    jobs = {_choices(good, job): _job_problems(loader, repo, config_name, job, check) for job in _jobs(good)}
    for choices, found in jobs.items():
        everywhere = [problem for problem in found if all(problem in others for others in jobs.values())]
        problems += [problem if problem in everywhere else f"{problem} (in {choices})" for problem in found]
    forced = [f"++{o.input_line}" if _is_plain_setting(repo, o) else o.input_line for o in overrides]
    return list(dict.fromkeys(problems)), forced


def _search_path(args: argparse.Namespace) -> Any:
    path = create_config_search_path(args.config_path or str(CONFIG_DIR))
    if args.config_dir:
        folder = f"file://{Path(args.config_dir).absolute()}"
        path.prepend(provider="command-line", path=folder, anchor=SearchPathQuery(provider="schema"))
    return path


def _is_group(repo: Any, override: Override) -> bool:
    return bool(repo.group_exists(override.key_or_group))


def _is_hydra(override: Override) -> bool:
    return bool(override.key_or_group.split(".")[0].split("/")[0] == "hydra")


def _is_plain_setting(repo: Any, override: Override) -> bool:
    return override.type.name == "CHANGE" and not _is_group(repo, override) and not _is_hydra(override)


def _options(repo: Any, group: str) -> list[str]:
    found = list(repo.get_group_options(group, ObjectType.CONFIG))
    for folder in repo.get_group_options(group, ObjectType.GROUP):
        found += [f"{folder}/{option}" for option in _options(repo, f"{group}/{folder}")]
    return found


def _added_problems(repo: Any, override: Override, chosen: Mapping[str, Any]) -> list[str]:
    """An option added to a group that has one (which another option replaces), or forced, which no group allows."""
    if not (override.is_add() or override.is_force_add()) or not _is_group(repo, override):
        return []
    typed, key = str(override.input_line), override.get_key_element().lstrip("+")
    right = f"{'' if key in chosen else '+'}{key}={typed.partition('=')[2]}"
    if typed == right or isinstance(override.value(), Mapping):
        return []
    return [f"{typed}: write {right}"]


def _option_problems(repo: Any, override: Override) -> list[str]:
    if override.is_delete() or _is_hydra(override) or not _is_group(repo, override):
        return []
    known = _options(repo, override.key_or_group)
    if not override.is_sweep_override():
        value = override.value()
        values = value if isinstance(value, list) else [value]
    elif override.is_discrete_sweep() and override.value_type.name != "GLOB_CHOICE_SWEEP":
        values = list(override.sweep_string_iterator())
    else:
        return []
    group, problems = override.key_or_group, []
    for value in values:
        if value is None or value == "null":
            names = ", ".join(sorted(known))
            problems.append(f"{group} = null: no such option; ~{group} leaves the group out; known: {names}")
        elif str(value) not in known:
            problems.append(f"{group} = {value}: no such option; {suggest(str(value), known)}")
    return problems


def _sweep_problems(override: Override, multirun: bool) -> list[str]:
    if multirun or not override.is_sweep_override():
        return []
    return [
        f"{override.input_line}: several values, so several runs: give -m (or a list as key=[a,b], "
        "a text with a comma in quotes)"
    ]


def _jobs(overrides: list[Override]) -> list[list[Override]]:
    """The jobs of a sweep; values that only a sweeper plugin can draw are left out."""
    drawn = [o for o in overrides if not o.is_sweep_override() or o.is_discrete_sweep()]
    [batch] = BasicSweeper.split_arguments([o for o in drawn if not o.is_delete()], None)
    deletions = [o for o in drawn if o.is_delete()]
    parser = OverridesParser.create()
    return [parser.parse_overrides(job) + deletions for job in itertools.islice(batch, MOST_JOBS)]


def _choices(overrides: list[Override], job: list[Override]) -> str:
    """Return what sets this job apart from the sweep's other jobs."""
    swept = {o.get_key_element() for o in overrides if o.is_sweep_override()}
    return " ".join(o.input_line for o in job if o.get_key_element() in swept)


def _job_problems(loader: Any, repo: Any, config_name: str, job: list[Override], check: Check) -> list[str]:
    settings = [o for o in job if not _is_group(repo, o) and not _is_hydra(o) and not o.is_delete()]
    rest = [o.input_line for o in job if o not in settings]
    try:
        config = loader.load_configuration(config_name, rest, RunMode.RUN)
    except CompactHydraException as error:
        return [" ".join(message(error).split())]
    problems = []
    with open_dict(config):
        del config["hydra"]
        for override in settings:
            try:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
            except (OmegaConfBaseException, CompactHydraException) as error:
                problems.append(f"{override.input_line}: {_first_line(error)}")
    return problems + check(config)


def message(error: BaseException) -> str:
    """Hydra's own words and their cause, without the search path that it appends."""
    text = str(error).split("\nConfig search path:")[0].strip()
    cause = _first_line(error.__cause__) if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return "\n".join(part for part in (text, cause) if part) or type(error).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
