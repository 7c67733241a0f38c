"""`--set field=value`: fields of a configuration, given on the command line."""

from __future__ import annotations

import contextlib
import difflib
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from p0circuit.errors import P0Error

Config = TypeVar("Config")


def with_settings(config: Config, settings: Sequence[str]) -> Config:
    """Return a configuration with some of its fields replaced.

    Args:
        config: a dataclass.
        settings: pairs `field=value`. A value is read as JSON; text needs no quotes, and a list becomes a tuple.

    Returns:
        The configuration; `config` itself if `settings` is empty.

    Raises:
        P0Error: a pair has no "=", its name is no field, or its value is not of the field's type.

    Example:
        with_settings(SinkMapConfig(), ["eps=0.2"])
    """
    if not settings:
        return config
    assert is_dataclass(config) and not isinstance(config, type)
    current = {field.name: getattr(config, field.name) for field in fields(config)}
    kinds = typing.get_type_hints(type(config))
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise P0Error(f"{setting!r} is not of the form field=value, as in {_example(current)}")
        if name not in current:
            near = difflib.get_close_matches(name, current, n=1)
            hint = f"did you mean {near[0]!r}? The" if near else "the"
            raise P0Error(f"there is no field {name!r}; {hint} fields are {_listed(current)}")
        values[name] = _value(name, text, kinds[name], current[name])
    return replace(config, **values)


def _value(name: str, text: str, kind: object, current: object) -> object:
    """Read a value of an annotated type from text."""
    candidates: list[object] = [text]
    with contextlib.suppress(json.JSONDecodeError):
        candidates.append(json.loads(text))
    for candidate in candidates:
        with contextlib.suppress(_WrongTypeError):
            return _converted(kind, candidate)
    raise P0Error(f"{name} cannot be {text!r}; expected {_name(kind)}, such as {json.dumps(current)}")


class _WrongTypeError(Exception):
    """A value is not of a type."""


def _converted(kind: object, value: object) -> object:
    """Return a value as one of an annotated type: a plain type, a union, a Literal, or a tuple of one type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for part in parts:
            with contextlib.suppress(_WrongTypeError):
                return _converted(part, value)
    elif origin is typing.Literal and value in parts:
        return value
    elif origin is tuple and isinstance(value, list):
        fixed = Ellipsis not in parts
        if fixed and len(value) != len(parts):
            raise _WrongTypeError
        return tuple(_converted(parts[index] if fixed else parts[0], item) for index, item in enumerate(value))
    # A bool is an int to isinstance.
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    raise _WrongTypeError


_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def _name(kind: object) -> str:
    """The name of a type as a person would write it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_name, parts))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(json.dumps, parts))
    if origin is tuple:
        return f"a list of {_PLURALS.get(parts[0], _name(parts[0]))}"
    names: dict[object, str] = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(kind, str(kind))


def _listed(current: dict[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in current.items())


def _example(current: dict[str, Any]) -> str:
    return next(f"{name}={json.dumps(value)}" for name, value in current.items())
