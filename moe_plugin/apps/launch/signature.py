"""Checks configuration values against the type hints of what they are passed to: constructors are the schema."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from moe_plugin.errors import ConfigError

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], key: str) -> None:
    """Check names and scalar types of keyword arguments; what a hint doesn't tell passes.

    Args:
        target: The class or function that will be called.
        arguments: Its keyword arguments, as configured.
        key: Where they stand in the configuration, for the message.

    Raises:
        ConfigError: An argument that the target doesn't take, or a scalar of another type.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some builtins tell nothing
        return
    hints = hints_of(target)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name in HYDRA_KEYS:
            continue
        full_key = f"{key}.{name}" if key else name
        if name not in parameters and not takes_any:
            raise ConfigError(unknown_key(full_key, value, parameters))
        if (reason := mismatch(value, hints.get(name, Any))) is not None:
            raise ConfigError(f"'{full_key}' must be {reason}, got {value!r}.")


def unknown_key(key: str, value: object, known: Iterable[str]) -> str:
    """Return the message for a key that isn't there, with the nearest that are."""
    parent, _, name = key.rpartition(".")
    known = [k for k in known if k != "self" and k not in HYDRA_KEYS]
    near = difflib.get_close_matches(name, known, n=1)
    where = f"'{parent}'" if parent else "the configuration"
    guess = f" Did you mean '{parent + '.' if parent else ''}{near[0]}'?" if near else ""
    return f"'{key}' (got {value!r}) is not a key of {where}.{guess} Allowed: {', '.join(known)}."


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints of a callable's parameters; none if they name what isn't importable."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return get_type_hints(function)
    except (NameError, TypeError):  # names under TYPE_CHECKING; builtins without hints
        return {}


def mismatch(value: object, hint: Any) -> str | None:
    """Return what would be allowed if ``value`` is a scalar that the hint rules out, else None."""
    if not isinstance(value, (bool, int, float, str, NoneType)):
        return None
    allowed = list(alternatives(hint))
    if any(accepts(choice, value) for choice in allowed):
        return None
    return " or ".join(dict.fromkeys(describe(choice) for choice in allowed))


def alternatives(hint: Any) -> Iterable[Any]:
    """Yield the members of a union, each value of a literal; anything else as it is."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for member in get_args(hint):
            yield from alternatives(member)
    elif origin is Annotated:
        yield from alternatives(get_args(hint)[0])
    elif origin is Literal:
        yield from (Literal[value] for value in get_args(hint))
    else:
        yield hint


def accepts(choice: Any, value: object) -> bool:
    """Return whether one alternative of a hint lets a scalar through; hints that aren't about scalars do."""
    if get_origin(choice) is Literal:
        return value == get_args(choice)[0] and type(value) is type(get_args(choice)[0])
    if choice not in SCALARS:
        return not is_about_objects(choice)
    if choice is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is choice


def is_about_objects(choice: Any) -> bool:
    """Return whether a hint asks for a class or container that no scalar of a configuration can be."""
    kind = get_origin(choice) or choice
    return (
        inspect.isclass(kind)
        and kind is not object
        and kind.__module__ in {"builtins", "collections.abc", "datetime"}
    )


def describe(choice: Any) -> str:
    """Return one alternative in words."""
    if get_origin(choice) is Literal:
        return repr(get_args(choice)[0])
    return SCALARS.get(choice) or getattr(choice, "__name__", str(choice))
