"""Where a task's rows come from: an embedded generator, a local folder, or the hub, in this order.

A row is a plain dict, column -> value, exactly as the source has it; `iapt.data.files` reads local ones.
"""

from __future__ import annotations

from pathlib import Path

from iapt.config.errors import UserError, suggest
from iapt.config.task import TaskConfig
from iapt.data.files import SUFFIXES, Row, in_order, read_file, split_of, without_nan


def load_rows(config: TaskConfig, split: str, data_dir: str | None) -> list[Row]:
    """All rows of one split, in the source's order.

    Args:
        config: the task; `source.splits` says what the source calls the split.
        split: "train", "validation" or "test".
        data_dir: a folder holding `<task.name>/<split>.jsonl|json|csv|tsv|parquet|txt` (or shards of it as the hub
            names them, `<split>-00000-of-00002.parquet`), or such files in `<task.name>/<subset>` for a task with
            `source.subsets`, or one file `<task.name>.csv` (or the like), whose rows are the train split. The hub is
            asked when it is null or holds nothing of this task, and never to fill up a folder that lacks one split: a
            task whose splits come from two places is no longer the task.

    Raises:
        UserError: nothing to load from, two places to load from, a missing or empty split, an unreadable file
            (with its line).
    """
    name = config.source.splits.get(split, split)
    if config.source.generator:
        rows = _generated(config.source.generator, name)
    else:
        place = _local_place(config, data_dir)
        subsets: list[str | None] = [*config.source.subsets]
        rows = []
        for subset in subsets or [None]:
            found = _local(config, place, name, subset) if place else _hub(config, name, data_dir, subset)
            rows += [{**row, "subset": subset} for row in found] if subset else found
    if not rows:
        raise UserError(f"task '{config.name}': split '{name}' is empty")
    return rows


def _generated(generator: str, name: str) -> list[Row]:
    from iapt.data import toy

    try:
        return list(toy.rows(generator, name))
    except ValueError as error:  # it knows neither this generator nor our words for it
        raise UserError(f"task.source.generator = {generator}: {error}") from None


def _local_place(config: TaskConfig, data_dir: str | None) -> Path | None:
    """The task's folder, or the one file that is all there is of it."""
    if not data_dir:
        return None
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"data_dir = {data_dir}: no such folder")
    places = [root / config.name] if (root / config.name).is_dir() else []
    places += [file for suffix in SUFFIXES if (file := root / f"{config.name}{suffix}").is_file()]
    if len(places) > 1:
        raise UserError(f"task '{config.name}': found {' and '.join(map(str, places))}; keep one")
    return places[0] if places else None


def _local(config: TaskConfig, place: Path, name: str, subset: str | None) -> list[Row]:
    if place.is_file() and not subset:
        train = config.source.splits.get("train", "train")
        if name != train:
            raise _missing_split(config, name, {train}, str(place))
        return read_file(place, config.source.quotes)
    folder = place / subset if subset else place
    if not folder.is_dir():
        raise UserError(f"task '{config.name}': task.source.subsets names '{subset}', but there is no {folder}")
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    found = [path for path in files if name in (path.stem, split_of(path))]
    if not found:
        raise _missing_split(config, name, set(map(split_of, files)), str(folder))
    if [p.stem for p in found] == [name]:
        return read_file(found[0], config.source.quotes)
    try:
        shards = in_order(found)
    except UserError as error:
        raise UserError(f"task '{config.name}': split '{name}' has {error}") from None
    return [row for shard in shards for row in read_file(shard, config.source.quotes)]


def _missing_split(config: TaskConfig, name: str, known: set[str], where: str) -> UserError:
    hint = ""
    for alone, rule in (("train", "carve_train_twice"), ("validation", "split_validation")):
        if known == {config.source.splits.get(alone, alone)} and config.split_rule != rule:
            hint = f"; with nothing but a {alone} split, use task.split_rule={rule}"
    return UserError(f"task '{config.name}': no split '{name}' in {where}; {suggest(name, known)}{hint}")


def _hub(config: TaskConfig, name: str, data_dir: str | None, subset: str | None) -> list[Row]:
    source, configuration = config.source, subset or config.source.config
    local = _nothing_local(config, data_dir) if data_dir else "data_dir (or IAPT_DATA_DIR) is not set"
    if not source.path:
        raise UserError(f"task '{config.name}': no data: {local}; and task.source.path is not set")
    import datasets  # a second of imports that local files do not need

    try:
        rows = datasets.load_dataset(source.path, configuration, split=name, revision=source.revision)
    except Exception as error:  # the hub fails in a dozen ways, each with its own class
        known = _hub_splits(error)
        if known:
            raise _missing_split(config, name, known, f"{source.path} on the hub") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f"{source.path}{f' ({configuration})' if configuration else ''}"
        raise UserError(
            f"task '{config.name}': no data\n  local files: {local}\n  hub: {where}: {reason[:300]}"
        ) from error
    return list(without_nan(rows.to_list()))


def _nothing_local(config: TaskConfig, data_dir: str) -> str:
    root = Path(data_dir).expanduser()
    there = [p.relative_to(root).as_posix() for p in (root / config.name).parent.glob("*")]
    return f"{data_dir} has no folder '{config.name}' and no file '{config.name}.csv'; {suggest(config.name, there)}"


def _hub_splits(error: Exception) -> set[str]:
    """The splits that exist, out of datasets' message 'Unknown split "x". Should be one of [...]'."""
    head, _, tail = str(error).partition("Should be one of [")
    if "split" not in head.lower():
        return set()
    return {word.strip(" '\"") for word in tail.partition("]")[0].split(",")} - {""}
