"""Limits of single numbers that can be checked without importing torch.

Lightning checks few of its own, and late. Those of our constructors are repeated here for the commonest slips only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_fraction, check_integer, check_not_negative, check_positive

LARGEST_SEED = 2**32 - 1
"""What Lightning's `seed_everything` takes: NumPy's seeds have 32 bits."""


def check_bounds(config: DictConfig) -> None:
    """Check the numbers of a configuration that are listed here; those that are null or not there pass.

    Raises:
        ConfigError: One is out of range; it names the full key.
    """
    for key, check in _CHECKS.items():
        if not OmegaConf.is_missing(config, key.partition(".")[0]):
            value = OmegaConf.select(config, key, throw_on_missing=False)
            if value is not None:
                check(key, value)


def check_seed(key: str, value: Any) -> None:
    """Check a seed.

    Args:
        key: The setting.
        value: Its value.

    Raises:
        ConfigError: It is negative or has more than 32 bits.
    """
    check_integer(key, value, least=0)
    if value > LARGEST_SEED:
        raise ConfigError(key, f"must be <= {LARGEST_SEED}", value)


def _check_steps(key: str, value: Any) -> None:
    if value != -1 and value < 1:
        raise ConfigError(key, "must be >= 1, or -1 for no limit", value)


def _check_clip(key: str, value: Any) -> None:
    check_not_negative(key, value, "a number >= 0 or null")


def _check_share(key: str, value: Any, *, least: int) -> None:
    """Check what Lightning takes as a whole number of batches, or as a share of all of them."""
    fits = (
        value >= least if isinstance(value, int) else (0.0 if least == 0 else math.ulp(0.0)) <= value <= 1.0
    )
    if isinstance(value, bool) or not fits:
        share = "0.0 <= share" if least == 0 else "0.0 < share"
        raise ConfigError(
            key, f"must be an integer >= {least}, or a share of an epoch ({share} <= 1.0)", value
        )


def _check_time(key: str, value: Any) -> None:
    """Check a time limit: text, or numbers of days, hours and so on."""
    is_text = isinstance(value, str)
    is_some = any(int(part) for part in re.findall(r"\d+", value)) if is_text else any(value.values())
    if not is_some or (is_text and not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", value)):
        raise ConfigError(key, "must be days:hours:minutes:seconds, more than none", value)


def _check_devices(key: str, value: Any) -> None:
    if value != "auto":
        check_integer(key, value)


_COUNT = check_integer
_FROM_ZERO: Callable[[str, Any], None] = partial(check_integer, least=0)
_CHECKS: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(("seed", "data.seed"), check_seed),
    **dict.fromkeys(("trainer.max_steps", "trainer.max_epochs"), _check_steps),
    "trainer.gradient_clip_val": _check_clip,
    "trainer.max_time": _check_time,
    "trainer.log_every_n_steps": _FROM_ZERO,
    "trainer.fast_dev_run": lambda key, value: isinstance(value, bool) or _FROM_ZERO(key, value),
    "trainer.num_sanity_val_steps": partial(check_integer, least=-1),
    **dict.fromkeys(
        ("trainer.limit_train_batches", "trainer.val_check_interval"), partial(_check_share, least=1)
    ),
    **dict.fromkeys(("trainer.limit_val_batches", "trainer.overfit_batches"), partial(_check_share, least=0)),
    **dict.fromkeys(
        (
            *("trainer.check_val_every_n_epoch", "trainer.accumulate_grad_batches", "trainer.num_nodes"),
            *("strategy.tensor_parallel_size", "model.dim", "model.num_layers", "model.num_heads"),
            *("data.context_length", "data.batch_size", "data.val_batch_size"),
            *("data.max_train_tokens", "data.max_val_tokens"),
            *("experts.num_experts", "experts.top_k", "experts.hidden_dim"),
        ),
        _COUNT,
    ),
    "strategy.devices": _check_devices,
    "data.validation_fraction": check_fraction,
    "model.optimizer.learning_rate": check_positive,
    "model.optimizer.weight_decay": check_not_negative,
    "model.optimizer.warmup_steps": _FROM_ZERO,
    "model.optimizer.floor": partial(check_fraction, with_one=True),
}
"""The check of each number by its full key."""
