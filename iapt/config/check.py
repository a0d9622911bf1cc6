"""One check of a configuration, which names every problem at once.

Hydra only composes YAML. `load_config` turns what it composed into the dataclasses of `iapt.config.schema`; nothing
past the builders ever sees an OmegaConf object.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from iapt.config.errors import ConfigError, suggest
from iapt.config.method import MethodConfig
from iapt.config.paths import CONFIG_DIR
from iapt.config.quoting import chosen_word, only_texts
from iapt.config.schema import BUDGET, BUDGET_FORM, Config

# All is resolved when types are checked, and OmegaConf takes anything with ${ in it for any type.
_NO_INTERPOLATION = "$\ue000{"


def load_config(
    composed: DictConfig | dict[str, Any], methods: Mapping[str, type[MethodConfig]], schema: type[Any] = Config
) -> Any:
    """Check a composed configuration and return it as dataclasses.

    Args:
        composed: what Hydra composed, or a plain mapping (a saved `config.yaml`).
        methods: the schemas of methods, by kind.
        schema: the dataclass to check against, `Config` unless told.

    Raises:
        ConfigError: naming every unknown key (with the nearest known one), wrong type, value out of range and
            contradiction between fields.
    """
    # YAML's dates are objects of Python; a text that became one is named below.
    raw = OmegaConf.to_container(OmegaConf.create(composed, flags={"allow_objects": True}), resolve=False)
    assert isinstance(raw, dict)
    problems: list[str] = []
    key, kind = _method_kind(raw)
    if "method" in {f.name for f in dataclasses.fields(schema)} and kind not in methods:
        raise ConfigError([f"method.{key} = {kind!r}: unknown method; {suggest(str(kind), methods)}"])
    sections = {"method": methods[kind]} if kind in methods else {}
    known = _keep_known(schema, typing.cast(dict[str, Any], raw), "", sections, problems)
    try:
        merged = OmegaConf.merge(_defaults(schema, sections), known)
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([*problems, f"{error.full_key or ''}: {error.msg or error}"]) from None
    config = _build(schema, typing.cast(dict[str, Any], resolved), "", sections, problems)
    if not problems and isinstance(config, Config):
        problems += contradictions(config)
    if problems:
        raise ConfigError(problems)
    return config


def literal(stored: Any) -> Any:
    """Stored settings for `load_config`, their texts as they stand: `${...}` in them is text, no interpolation.

    A run writes its settings resolved. Whoever reads those of another must not have them look up anything here, the
    environment least of all.
    """
    # OmegaConf takes an odd number of backslashes before ${ for an escape.
    return _each_text(stored, lambda text: re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text))


def method_config(settings: Mapping[str, Any], methods: Mapping[str, type[MethodConfig]]) -> MethodConfig:
    """Check the settings of a method by themselves, as `load_config` checks them within a run's.

    Settings left out are those of `configs/method/NAME.yaml`, so that a name means the same here and on the
    command line. With a `kind` they are the schema's: that is how adapters and other libraries spell a method.

    Raises:
        ConfigError: as `load_config`, contradictions between the method's own fields included.
    """
    alone = dataclasses.make_dataclass("Alone", [("method", MethodConfig, field(default_factory=MethodConfig))])
    shipped = CONFIG_DIR / "method" / f"{settings.get('name')}.yaml"
    given = OmegaConf.create(literal(settings))
    known = OmegaConf.merge(OmegaConf.load(shipped), given) if "kind" not in given and shipped.is_file() else given
    method: MethodConfig = load_config({"method": known}, methods, alone).method
    if problems := method.problems():
        raise ConfigError(problems)
    return method


def unknown_keys(
    partial: dict[str, Any], methods: Mapping[str, type[MethodConfig]], also: tuple[str, ...] = ()
) -> list[str]:
    """One line per key of an incomplete configuration that the schema lacks; `also` may stand at the top."""
    raw = OmegaConf.to_container(OmegaConf.create({k: v for k, v in partial.items() if v is not None}))
    assert isinstance(raw, dict)
    known = [*(f.name for f in dataclasses.fields(Config)), *also]
    strange = [str(k) for k in raw if k not in known]
    problems = [f"{k} = {raw[k]!r}: unknown key; {suggest(str(k), known)}" for k in strange]
    method = _method_kind(raw)[1]
    # Without its name nobody knows which schema a method's settings follow.
    skipped = {*strange, *also} | (set() if method in methods else {"method"})
    judged = {str(k): v for k, v in raw.items() if k not in skipped}
    _keep_known(Config, judged, "", {"method": methods[method]} if method in methods else {}, problems)
    return problems


def contradictions(config: Config) -> list[str]:
    """Problems that only show when two fields are read together."""
    found = []
    backbone, hardware, trainer = config.backbone, config.hardware, config.trainer
    if backbone.kind == "pretrained" and not backbone.path:
        found.append(f"backbone.path = null: backbone '{backbone.name}' needs a hub id or a folder, backbone.path=...")
    if backbone.kind == "random" and "model_type" not in backbone.shape:
        found.append("backbone.shape: a random backbone needs at least backbone.shape.model_type (llama, gpt2 ...)")
    if backbone.quantization != "none" and hardware.device == "cpu":
        found.append(f"backbone.quantization = {backbone.quantization}: needs a GPU, but hardware.device = cpu")
    if backbone.quantization != "none" and hardware.strategy == "fsdp":
        found.append(f"backbone.quantization = {backbone.quantization}: not together with hardware.strategy = fsdp")
    if config.method.trains_backbone:
        whole = f"method {config.method.name} trains the whole backbone"
        if hardware.strategy == "fsdp":
            found.append(f"hardware.strategy = fsdp: shards frozen weights, but {whole}; allowed is ddp")
        if backbone.quantization != "none":
            found.append(f"backbone.quantization = {backbone.quantization}: {whole}; allowed is none")
    if hardware.strategy == "fsdp" and hardware.num_processes < 2:
        found.append("hardware.strategy = fsdp: needs hardware.num_processes >= 2, there is nothing to shard over")
    parts = hardware.num_processes * hardware.gradient_accumulation
    if trainer.batch_size is not None and trainer.batch_size < parts:
        found.append(
            f"trainer.batch_size = {trainer.batch_size}: must be at least hardware.num_processes x "
            f"hardware.gradient_accumulation = {parts}, or some parts would be empty"
        )
    found += config.task.problems()
    if trainer.learning_rate is not None and trainer.learning_rate <= 0:
        found.append(f"trainer.learning_rate = {trainer.learning_rate}: must be above 0")
    if not 0 <= config.seed < 2**32:
        found.append(f"seed = {config.seed}: allowed are 0 to {2**32 - 1}")
    if trainer.warmup_ratio > 1:
        found.append(f"trainer.warmup_ratio = {trainer.warmup_ratio}: a share of all steps, 0 to 1")
    if config.budget is not None and not BUDGET.fullmatch(config.budget.strip()):
        found.append(f"budget = {config.budget!r}: expected {BUDGET_FORM}")
    return found + config.method.problems() + config.method.problems_with(config.task)


def _method_kind(raw: dict[Any, Any]) -> tuple[str, Any]:
    """The key that says which registered method is meant, and its value."""
    method = raw.get("method") or {}
    key = "kind" if method.get("kind") else "name"
    return key, method.get(key)


def _defaults(schema: type[Any], sections: dict[str, type[Any]]) -> dict[str, Any]:
    values = {}
    for f in dataclasses.fields(schema):
        nested = sections.get(f.name) or _nested(schema, f.name)
        if nested:
            values[f.name] = _defaults(nested, {})
        elif f.default is not dataclasses.MISSING:
            values[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            # A default mapping is replaced by the user's, not merged with it.
            values[f.name] = f.default_factory()
    return values


def _nested(schema: type[Any], name: str) -> type[Any] | None:
    default = next(f for f in dataclasses.fields(schema) if f.name == name).default_factory
    return default if isinstance(default, type) and dataclasses.is_dataclass(default) else None


def _keep_known(
    schema: type[Any], raw: dict[str, Any], prefix: str, sections: dict[str, type[Any]], problems: list[str]
) -> dict[str, Any]:
    """`raw` without the keys that `schema` lacks; each of those becomes a problem, as does what should be text."""
    fields, hints = {f.name: f for f in dataclasses.fields(schema)}, typing.get_type_hints(schema)
    kept = {}
    for key, value in raw.items():
        if key not in fields:
            problems.append(f"{prefix}{key} = {value!r}: unknown key; {suggest(str(key), fields)}")
            continue
        nested = sections.get(key) or _nested(schema, key)
        if nested and not isinstance(value, dict):
            problems.append(f"{prefix}{key} = {value!r}: expected a group of settings, not one value")
        elif nested:
            kept[key] = _keep_known(nested, value, f"{prefix}{key}.", {}, problems)
        elif choices := fields[key].metadata.get("choices"):
            kept[key] = chosen_word(value, choices)
        else:
            numbers = fields[key].metadata.get("numbers", False)
            kept[key], found = only_texts(hints[key], value, f"{prefix}{key}", numbers=numbers)
            problems += found
    return kept


def _build(
    schema: type[Any], values: dict[str, Any], prefix: str, sections: dict[str, type[Any]], problems: list[str]
) -> Any:
    """An instance of `schema`; each value that does not fit becomes a problem (and keeps its default)."""
    fitted: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        value: Any = values.get(f.name)
        nested = sections.get(f.name) or _nested(schema, f.name)
        if nested:
            fitted[f.name] = _build(nested, value, f"{prefix}{f.name}.", {}, problems)
            continue
        where = f"{prefix}{f.name} = {value!r}"
        choices, minimum = f.metadata.get("choices"), f.metadata.get("minimum")
        allowed = f"allowed are {', '.join(map(str, choices))}" if choices else ""
        if value == "???":
            problems.append(f"{prefix}{f.name}: missing, and has no default")
            continue
        try:
            typed = OmegaConf.structured(dataclasses.make_dataclass("One", [(f.name, hints[f.name])]))
            typed[f.name] = _each_text(value, lambda text: text.replace("${", _NO_INTERPOLATION))
            held = OmegaConf.to_container(typed)[f.name]  # type: ignore[index,call-overload]
            value = _each_text(held, lambda text: text.replace(_NO_INTERPOLATION, "${"))
        except OmegaConfBaseException:
            problems.append(f"{where}: {allowed or f'expected {type_name(hints[f.name])}'}")
            continue
        if choices and value not in choices:
            problems.append(f"{where}: {allowed}")
        elif minimum is not None and value is not None and value < minimum:
            problems.append(f"{where}: must be at least {minimum}")
        fitted[f.name] = value
    return schema(**fitted)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed, keys left alone: OmegaConf interpolates none."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each_text(item, change) for key, item in value.items()}
    return [_each_text(item, change) for item in value] if isinstance(value, list) else value


def type_name(hint: Any) -> str:
    """A type of the schema in the words of YAML: `str or null`, `dict[str, anything]`."""
    name = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return name.replace("None", "null").replace("typing.", "").replace("Any", "anything").replace(" | ", " or ")
