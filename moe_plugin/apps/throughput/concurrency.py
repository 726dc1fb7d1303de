"""What ``moe-eval throughput=true`` measures, as the command line says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_plugin.apps.launch.signature import check_arguments, mismatch
from moe_plugin.errors import ConfigError

KEY = "throughput"
USUAL_LENGTH = 32


@dataclass(frozen=True)
class Concurrency:
    """How many sequences are read at once.

    Attributes:
        sequences: Numbers of sequences, rising.
        length: Tokens of each; None is 32, or the model's context length where that is shorter.
        rounds: Times that each number is read.
    """

    sequences: Sequence[int] = (1, 4, 16, 64, 256, 1024)
    length: int | None = None
    rounds: int = 5

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: One is not positive, or the numbers of sequences do not rise.
        """
        numbers = self.sequences
        if not isinstance(numbers, (list, tuple)) or not numbers or not all(map(_is_positive, numbers)):
            raise ConfigError(
                f"'{KEY}.sequences' must be whole numbers >= 1 such as [1,64], got {numbers!r}."
            )
        if list(numbers) != sorted(set(numbers)):
            raise ConfigError(f"'{KEY}.sequences' must rise, got {numbers!r}.")
        for name in ("length", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"'{KEY}.{name}' must be >= 1, got {value}.")

    def length_for(self, context_length: int) -> int:
        """Return tokens of a sequence for a model.

        Raises:
            ConfigError: More are asked for than the model reads.
        """
        if self.length is None:
            return min(USUAL_LENGTH, context_length)
        if self.length > context_length:
            raise ConfigError(
                f"'{KEY}.length' must be <= the model's context_length ({context_length}), got {self.length}."
            )
        return self.length


def take_concurrency_(changes: dict[str, Any]) -> Concurrency | None:
    """Take what concerns throughput out of the values given on the command line.

    Args:
        changes: Values by key; ``throughput`` and all keys below it are removed.

    Returns:
        None where throughput is not asked for.

    Raises:
        ConfigError: A key is unknown, or a value is not allowed.
    """
    prefix = f"{KEY}."
    settings = {key.removeprefix(prefix): changes.pop(key) for key in list(changes) if key.startswith(prefix)}
    asked = changes.pop(KEY, bool(settings))
    if not isinstance(asked, bool):
        raise ConfigError(f"'{KEY}' must be {mismatch('', bool)}, got {asked!r}.")
    check_arguments(Concurrency, {**settings, "sequences": ()}, KEY)  # which checks its sequences itself
    concurrency = Concurrency(**settings)
    return concurrency if asked else None


def _is_positive(number: object) -> bool:
    return type(number) is int and number >= 1
