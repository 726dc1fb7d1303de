"""How to balance a model: the settings that `balance_` and the callbacks share, checked in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from moe_plugin.attach.adapter import Adapter
from moe_plugin.balancing.rules import Proportional, Rule
from moe_plugin.balancing.schedule import RateSchedule
from moe_plugin.errors import AttachError, ConfigError
from moe_plugin.experts.kernels.choice import check_choice

Rules = Rule | Mapping[str, Rule] | None
Sites = str | Sequence[str] | Callable[[str], bool] | None
FrozenRouters = Literal["auto", "balance", "keep"]
Experts = Literal["fused"] | None

DEFAULT_RULE = Proportional()


def rule_or_default(rule: Rules) -> Rules:
    """Return the rule; the default one for None, as in a configuration without an option of the group 'rule'."""
    return DEFAULT_RULE if rule is None else rule


@dataclass(frozen=True)
class BalanceSettings:
    """How to balance a model; the attributes are arguments of `balance_`.

    Raises:
        ConfigError: If 'frozen_routers' or 'experts' is not one of these, or 'fused' has kernels that cannot run.
    """

    rule: Rules = DEFAULT_RULE
    _: KW_ONLY
    sites: Sites = None
    schedule: RateSchedule | None = None
    mask: str | None = "attention_mask"
    adapters: Sequence[Adapter] = ()
    frozen_routers: FrozenRouters = "auto"
    experts: Experts = None
    verify: bool = True

    def __post_init__(self) -> None:
        """Check the settings and bring them into one form."""
        if self.frozen_routers not in get_args(FrozenRouters):
            raise ConfigError("frozen_routers", "must be 'auto', 'balance' or 'keep'", self.frozen_routers)
        if self.experts not in ("fused", None):
            raise ConfigError("experts", "must be 'fused' or None", self.experts)
        if self.experts == "fused":
            check_choice()
        object.__setattr__(self, "schedule", self.schedule or RateSchedule())
        object.__setattr__(self, "adapters", tuple(self.adapters))

    def wants(self, name: str) -> bool:
        """Return whether the router of this name is to be balanced."""
        if self.sites is None:
            return True
        if callable(self.sites):
            return self.sites(name)
        globs = [self.sites] if isinstance(self.sites, str) else self.sites
        return any(fnmatchcase(name, glob) for glob in globs)

    def rate_factor(self, step: int) -> float:
        """Return the factor on the rate in update number ``step``; the first is 1."""
        assert self.schedule is not None, "filled in when the settings were made"
        return self.schedule(step)

    def rule_for(self, name: str) -> Rule | None:
        """Return the rule of the router of this name.

        Raises:
            AttachError: If rules are given by glob and none matches.
        """
        if not isinstance(self.rule, Mapping):
            return self.rule
        for glob, candidate in self.rule.items():
            if fnmatchcase(name, glob):
                return candidate
        raise AttachError(f"'rule' must have a glob that matches router {name!r}, got {list(self.rule)}.")
