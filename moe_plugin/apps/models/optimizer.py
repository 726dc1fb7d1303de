"""AdamW with a linear warm-up and a cosine decay to a floor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_fraction, check_integer, check_not_negative, check_positive


@dataclass(frozen=True)
class AdamWWarmupCosine:
    """Numbers of the optimizer and its schedule.

    Attributes:
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay of matrices; norms and other vectors have none.
        betas: AdamW's running-mean factors.
        warmup_steps: Steps from 0 to the peak.
        floor: Final learning rate as a fraction of the peak.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 100
    floor: float = 0.1

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: A number is out of range.
        """
        check_positive("learning_rate", self.learning_rate)
        check_not_negative("weight_decay", self.weight_decay)
        if len(self.betas) != 2:
            raise ConfigError("betas", "must be two numbers", self.betas)
        for beta in self.betas:
            check_fraction("betas", beta)
        check_integer("warmup_steps", self.warmup_steps, least=0)
        check_fraction("floor", self.floor, with_one=True)

    def optimizer(self, parameters: Iterable[nn.Parameter], *, fused: bool) -> AdamW:
        """Return the optimizer over the parameters that require a gradient.

        Args:
            parameters: A model's parameters.
            fused: Update all parameters in one kernel. Not with an fp16 gradient scaler: a fused step is called
                even if the scaler found an overflow, and Lightning cannot clip gradients before it.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=self.learning_rate, betas=(self.betas[0], self.betas[1]), fused=fused)

    def schedule(self, optimizer: AdamW, total_steps: int) -> LambdaLR:
        """Return the schedule, to be stepped once per optimizer step, see `factor`."""
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))

    def factor(self, step: int, total_steps: int) -> float:
        """Return the learning rate at a step, as a fraction of the peak.

        Args:
            step: Optimizer steps taken before.
            total_steps: Steps of the run.
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.floor + (1 - self.floor) * cosine
