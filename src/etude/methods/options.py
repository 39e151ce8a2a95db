"""Options by name into frozen dataclasses, and back into plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from etude.experience.errors import UserError, unknown

D = TypeVar("D")


def build(cls: type[D], values: Mapping[str, Any], where: str = "") -> D:
    """An instance of the dataclass `cls` with these values; nested dataclasses take mappings.

    Raises UserError, naming the nearest option, for a name it lacks, and for a value of the wrong
    type.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise unknown("option", f"{where}{name}", [f"{where}{k}" for k in known])
        made[name] = _value(hints[name], value, f"{where}{name}", known[name])
    return cls(**made)


def _value(hint: Any, value: Any, where: str, field: Field[Any]) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            # What is not named keeps the outer field's default, not the inner class's.
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            base = {} if default is MISSING else {f.name: getattr(default, f.name) for f in fields(hint)}
            return build(hint, {**base, **value}, f"{where}.")
        raise UserError(f"option {where} takes named values, such as {fields(hint)[0].name}=..., not {value!r}")
    if not _fits(hint, value):
        raise UserError(f"option {where} takes {_describe(hint)}, not {value!r}")
    if get_origin(hint) is tuple:
        return tuple(value)
    return float(value) if hint is float else value


def _fits(hint: Any, value: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(h, value) for h in get_args(hint))
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(get_args(hint)[0], v) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if origin in (Union, UnionType):
        return " or ".join(_describe(h) for h in get_args(hint))
    if origin is tuple:
        return "a list"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "nothing"}
    return names.get(hint, str(hint))
