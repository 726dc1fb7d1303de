"""Checks configuration values against the type hints of what they are passed to: constructors are the schema."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import ListConfig

from moe_plugin.errors import ConfigError

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
CONTAINERS = {list: "a list", dict: "a mapping", tuple: "a list"}
HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


@dataclass(frozen=True)
class Parameters:
    """What a class or function takes.

    Attributes:
        hints: The type hint of each parameter by name; `Any` if it has none.
        takes_any: Whether it takes other names too.
    """

    hints: Mapping[str, Any]
    takes_any: bool


def _parameters_of(target: Callable[..., Any]) -> Parameters | None:
    """Return what a class or function takes; None if that is not known, as of some builtins."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return None
    hints = _hints_of(target)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return Parameters({name: hints.get(name, Any) for name in parameters}, takes_any)


def check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], key: str) -> None:
    """Check names and scalar types of keyword arguments; what a hint doesn't cover passes.

    Args:
        target: The class or function that will be called.
        arguments: Its keyword arguments, as configured.
        key: Their place in the configuration, for the message.

    Raises:
        ConfigError: The target doesn't take an argument, or takes a scalar of another type.
    """
    if (parameters := _parameters_of(target)) is not None:
        check_parameters(parameters, arguments, key)


def check_parameters(parameters: Parameters, arguments: Mapping[str, Any], key: str) -> None:
    """Check arguments against what is known of their target; see `check_arguments`.

    Raises:
        ConfigError: The target doesn't take an argument, or takes a scalar of another type.
    """
    for name in (each for each in arguments if each not in HYDRA_KEYS):
        value, full_key = arguments[name], f"{key}.{name}" if key else name
        if name not in parameters.hints and not parameters.takes_any:
            raise unknown_key(full_key, value, parameters.hints)
        if (allowed := mismatch(value, parameters.hints.get(name, Any))) is not None:
            raise ConfigError(full_key, f"must be {allowed}", value)


def unknown_key(key: str, value: object, known: Iterable[str]) -> ConfigError:
    """Return the error for a key that isn't there, with the nearest that is.

    Args:
        key: The key, in full.
        value: What it was to be set to.
        known: The names that are allowed instead of its last part.
    """
    parent, _, name = key.rpartition(".")
    known = [k for k in known if k != "self" and k not in HYDRA_KEYS]
    near = difflib.get_close_matches(name, known, n=1)
    where = f"'{parent}'" if parent else "the configuration"
    guess = [f"Did you mean '{key.removesuffix(name)}{near[0]}'?"] if near else []
    allowed = [f"Allowed: {', '.join(known)}."] if known else []
    return ConfigError(key, f"is not a key of {where}", value, " ".join(guess + allowed))


def _hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints of a callable's parameters; none if they name what isn't importable."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return get_type_hints(function)
    except (NameError, TypeError):  # names under TYPE_CHECKING; builtins without hints
        return {}


def mismatch(value: object, hint: Any) -> str | None:
    """Return what is allowed if a scalar does not fit a type hint, or a list one for scalars only, else None.

    Args:
        value: Anything else than a scalar or list passes.
        hint: The type hint.
    """
    allowed = list(_alternatives(hint))
    is_list = isinstance(value, (list, ListConfig))
    if not is_list and not isinstance(value, (bool, int, float, str, NoneType)):
        return None
    if any(not _is_scalar(choice) if is_list else _accepts(choice, value) for choice in allowed):
        return None
    return " or ".join(dict.fromkeys(_describe(choice) for choice in allowed))


def _alternatives(hint: Any) -> Iterable[Any]:
    """Yield the members of a union, each value of a literal; anything else as it is."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for member in get_args(hint):
            yield from _alternatives(member)
    elif origin is Annotated:
        yield from _alternatives(get_args(hint)[0])
    elif origin is Literal:
        yield from (Literal[value] for value in get_args(hint))
    else:
        yield hint


def _is_scalar(choice: Any) -> bool:
    """Return whether an alternative of a hint is about scalars."""
    return get_origin(choice) is Literal or choice in SCALARS


def _accepts(choice: Any, value: object) -> bool:
    """Return whether one alternative of a hint lets a scalar pass; hints that aren't about scalars do."""
    if get_origin(choice) is Literal:
        return value == get_args(choice)[0] and type(value) is type(get_args(choice)[0])
    if not _is_scalar(choice):
        kind = get_origin(choice) or choice
        # Classes and containers that no scalar of a configuration can be.
        others = {"builtins", "collections.abc", "datetime"}
        return not inspect.isclass(kind) or kind is object or kind.__module__ not in others
    if choice is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is choice


def _describe(choice: Any) -> str:
    """Return one alternative in words."""
    if get_origin(choice) is Literal:
        return repr(get_args(choice)[0])
    words = SCALARS | CONTAINERS
    kind = get_origin(choice) or choice
    return words.get(choice) or words.get(kind) or getattr(choice, "__name__", str(choice))
