"""Says in one line what is wrong with a configuration: the key, the value, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe_plugin.apps.launch.overrides import parse
from moe_plugin.apps.launch.signature import unknown_key


def explain_composition(
    error: HydraException | OmegaConfBaseException, overrides: Sequence[str], config_name: str = "config"
) -> str:
    """Return one line for an error raised while composing."""
    text = str(error)
    found = re.match(r"Could not override '([^']+)'", text)
    if found and found[1] in {override.key_or_group for override in parse(overrides)}:
        return explain_key(found[1], overrides, one_line(f"{text} {error.__cause__ or ''}"), config_name)
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':(.*?)Config search path",
        text,
        re.DOTALL,
    ):
        group, option, allowed = found[1], found[2], found[3].split()
        return f"'{group}' must be one of {', '.join(allowed)}; got {option!r}."
    return one_line(f"{text} {error.__cause__ or ''}")


def explain_key(key: str, overrides: Sequence[str], reason: str, config_name: str) -> str:
    """Return the line for a key that the configuration doesn't have, with the nearest that it has.

    Args:
        key: What could not be set.
        overrides: All words.
        reason: Hydra's own, for a key that is there but doesn't take the value.
        config_name: The file that is composed.
    """
    value, word = {
        o.key_or_group: (o.value(), word) for word, o in zip(overrides, parse(overrides), strict=True)
    }[key]
    others = [other for other in overrides if other != word]
    parent = OmegaConf.select(compose(config_name, others), key.rpartition(".")[0] or "")
    known = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
    return reason if key.rpartition(".")[2] in known else unknown_key(key, value, known)


def locate(message: str, config: DictConfig, near: str) -> str:
    """Put the full key before a message about an argument: ``'top_k' must be`` becomes ``'experts.top_k' must be``.

    Args:
        message: What the constructor said, beginning with the argument's name in quotes.
        config: The configuration; its first key of that name is meant, below ``near`` if it is there.
        near: The key of the node that was built.
    """
    found = re.match(r"'([\w.]+)'", message)
    keys = [key for key in leaves(config) if found and f".{key}".endswith(f".{found[1]}")]
    keys.sort(key=lambda key: not key.startswith(f"{near}."))
    return f"'{keys[0]}'{message[found.end() :]}" if found and keys else f"'{near}': {message}"


def leaves(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the full key of each value that isn't itself a mapping or an interpolation."""
    for name in map(str, config):
        key = f"{prefix}{name}"
        if OmegaConf.is_interpolation(config, name) or OmegaConf.is_missing(config, name) or key == "hydra":
            continue
        if isinstance(value := config[name], DictConfig):
            yield from leaves(value, f"{key}.")
        else:
            yield key


def one_line(text: str) -> str:
    """Return the text with every run of white space as one blank."""
    return " ".join(text.split())
