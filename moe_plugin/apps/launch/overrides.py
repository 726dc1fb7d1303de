"""The words of the command line: ``key=value``, as Hydra reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from moe_plugin.errors import ConfigError


def parse(words: Sequence[str]) -> list[Override]:
    """Return Hydra's reading of each word.

    Raises:
        ConfigError: A word is malformed.
    """
    return [_parse_word(word) for word in words]


def _parse_word(word: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(word)
        if not override.key_or_group:
            raise HydraException("the key is missing")
        return override
    except HydraException as error:
        reason, fix = str(error).splitlines()[0], "Text with blanks or signs goes in quotes: \"key='a b'\"."
        raise ConfigError(word, f"must be key=value ({reason})", fix=fix) from error


def choices(words: Sequence[str]) -> Iterator[list[str]]:
    """Yield the words that each word stands for: itself, or one per swept value (none for a range to sample)."""
    for word, override in zip(words, parse(words), strict=True):
        if not override.is_sweep_override():
            yield [word]
        elif override.is_discrete_sweep():
            yield [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        else:
            yield []
