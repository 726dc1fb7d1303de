"""What ``moe-eval throughput=true`` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_integer

KEY = "throughput"
USUAL_LENGTH = 32


@dataclass(frozen=True)
class ThroughputSettings:
    """How many sequences are read at once.

    Attributes:
        sequences: Numbers of sequences, rising.
        length: Tokens of each; None is 32, or the model's context length if that is shorter.
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
        if not isinstance(numbers, (list, tuple)) or not numbers:
            raise ConfigError(f"{KEY}.sequences", "must be integers >= 1 such as [1,64]", numbers)
        for number in numbers:
            check_integer(f"{KEY}.sequences", number)
        if list(numbers) != sorted(set(numbers)):
            raise ConfigError(f"{KEY}.sequences", "must rise", numbers)
        check_integer(f"{KEY}.length", self.length, or_none=True)
        check_integer(f"{KEY}.rounds", self.rounds)

    def length_for(self, context_length: int) -> int:
        """Return the tokens of a sequence for a model.

        Raises:
            ConfigError: More are asked for than the model reads.
        """
        if self.length is None:
            return min(USUAL_LENGTH, context_length)
        if self.length > context_length:
            rule = f"must be <= the model's context_length ({context_length})"
            raise ConfigError(f"{KEY}.length", rule, self.length)
        return self.length
