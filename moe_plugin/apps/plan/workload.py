"""What is to be trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from moe_plugin.apps.plan.choices import Precision
from moe_plugin.number_checks import check_positive_integers


@dataclass(frozen=True)
class Workload:
    """A model and the micro-batches that it is trained on.

    Attributes:
        build: Makes the model on the meta device, prepared; called several times.
        micro_batch: Sequences per rank in a step.
        sequence_length: Their length.
        precision: Lightning's name of it.
        activation_checkpointing: Whether layers run again in the backward.
    """

    build: Callable[[], nn.Module]
    micro_batch: int
    sequence_length: int
    precision: Precision
    activation_checkpointing: bool

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: A number is not positive.
        """
        check_positive_integers(micro_batch=self.micro_batch, sequence_length=self.sequence_length)
