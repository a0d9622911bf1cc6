"""Text that YAML or Hydra read as something else: `no` as false, `01` as 1, `1e3` as 1000.0, `null` as nothing.

Where a setting is text, only text is taken. What stood there cannot be told any more from what was read, so nothing
is turned back into text; the one exception is a setting with a few allowed words, of which a boolean can be but one.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

_WORDS = {True: ("yes", "on", "true"), False: ("no", "off", "false")}
_READ_AS: dict[type, str] = {
    bool: "a boolean, as are yes, no, on, off, true and false",
    int: "a number, so that 01 is 1 and 1_000 is 1000",
    float: "a number, so that 1e3 is 1000.0 and nan is none at all",
    type(None): "nothing, as are null, ~ and an empty value",
}
_EXAMPLES = ((True, "yes"), (False, "no"), (None, "null"))


def chosen_word(value: Any, allowed: tuple[Any, ...]) -> Any:
    """The one allowed word that YAML reads as this boolean (`off` for False); anything else as it is."""
    words = [word for word in allowed if isinstance(value, bool) and str(word).lower() in _WORDS[value]]
    return words[0] if len(words) == 1 else value


def only_texts(hint: Any, value: Any, key: str, *, numbers: bool = False) -> tuple[Any, list[str]]:
    """Look for what is no text in the places of a setting that the schema types as text.

    Args:
        hint: the setting's type: `str`, `list[str]`, `dict[str, str]` and so on; other types hold no text.
        value: as it was read, interpolations unresolved.
        key: the setting, for messages.
        numbers: whether a number is as good as its text.

    Returns:
        The value with texts in those places, so that the rest of the check can go on, and a problem for each.
    """
    problems: list[str] = []

    def visit(hint: Any, value: Any, where: str) -> Any:
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
            optional = len(kinds) < len(typing.get_args(hint))
            return value if len(kinds) > 1 or (optional and value is None) else visit(kinds[0], value, where)
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if hint is str and not isinstance(value, str | list | Mapping):
            if not (numbers and isinstance(value, int | float) and not isinstance(value, bool)):
                problems.append(_problem(where, value, key))
            return str(value)
        if origin is list and isinstance(value, list):
            return [visit(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
        if origin is dict and isinstance(value, Mapping):
            return {
                visit(inner[0], name, f"a key of {where}"): visit(inner[1], item, f"{where}.{name}")
                for name, item in value.items()
            }
        return value

    return visit(hint, value, key), problems


def _problem(where: str, value: Any, key: str) -> str:
    meant = _READ_AS.get(type(value), f"a {type(value).__name__}")
    example = next((word for read, word in _EXAMPLES if value is read), str(value))
    if where.startswith("a key of "):  # Hydra's grammar has no quotes for keys
        return f'{where} = {value!r}: expected text, but without quotes this is read as {meant}; quote it: "{example}"'
    if where == key:
        typed = f'{key}="{example}"'
    elif where.endswith("]"):
        typed = f'{where.rpartition("[")[0]}=["{example}",...]'
    else:
        typed = f'{where}="{example}"'
    return (
        f"{where} = {value!r}: expected text, but without quotes this is read as {meant}; quote it, for instance "
        f"\"{example}\" (on the command line '{typed}')"
    )
