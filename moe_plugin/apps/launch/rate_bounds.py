"""Whether a rate fits the scores: a step of the bias that is larger than all of their range can only be a mistake."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_not_negative

_FROM_ZERO_TO_ONE = {"Sigmoid", "SoftmaxBeforeTopK"}
_LARGEST = 10_000
"""A bias of this size rounds scores in fp32 to thousandths."""
_LARGE = 0.1
"""A step of a tenth of the range undoes the ranking of most tokens: doubtful, but not for us to forbid."""
_OF_NO_UNIT = {"Quantile"}
"""Rules whose rate is not in units of the scores."""


def check_rates(rule: DictConfig | None, score: DictConfig | None, key: str) -> None:
    """Check the rate of a rule, or of each rule of a mapping; a large one is mentioned on stderr.

    Args:
        rule: The node of a rule, or rules by glob.
        score: The node of the router's scores, if it has one.
        key: The full key of `rule`.

    Raises:
        ConfigError: A rate is negative, not finite, or larger than the range of the scores.
    """
    if not isinstance(rule, Mapping):
        return
    if "_target_" not in rule:
        for name in rule:
            check_rates(rule[name], score, f"{key}.{name}")
    elif isinstance(rate := rule.get("rate"), (int, float)) and _name(rule) not in _OF_NO_UNIT:
        _check(f"{key}.rate", rate, score)


def _check(key: str, rate: float, score: Any) -> None:
    check_not_negative(key, rate, "a number >= 0 or 'auto'")
    is_bounded = isinstance(score, Mapping) and _name(score) in _FROM_ZERO_TO_ONE
    if is_bounded and rate > 1:
        rule, fix = "must be <= 1, the range of the scores", "The bias moves by about the rate in a step."
        raise ConfigError(key, rule, rate, fix)
    if rate > _LARGEST:
        fix = "A bias of that size leaves nothing of the scores."
        raise ConfigError(key, f"must be <= {_LARGEST}", rate, fix)
    if is_bounded and rate > _LARGE:
        print(f"warning: '{key}' is large for scores from 0 to 1, got {rate!r}.", file=sys.stderr)


def _name(node: Any) -> str:
    """Return the name of a node's class."""
    return str(node.get("_target_")).rpartition(".")[2]
