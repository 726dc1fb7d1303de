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


@dataclass(frozen=True)
class BalanceSettings:
    """How to balance a model.

    Attributes:
        rule: How biases follow the load; a mapping from glob on the router's name to rule gives each router the first
            that matches; None only observes the load.
        sites: Which routers to balance: a glob, several, or a predicate on the module name; None takes all.
        schedule: Factor on the rate by update number; None keeps the rate constant.
        mask: Forward argument that marks real tokens (B, S); None counts every token.
        adapters: Adapters for blocks whose routing is not found automatically.
        frozen_routers: What to do with the bias of a router that is frozen now: 'balance' it, 'keep' it, or 'auto':
            keep it if the model owns one that is not zero, balance it otherwise.
        experts: 'fused' computes the experts of these routers by `moe_plugin.experts`, on the same parameters; all must
            be SwiGLU in stacked 3-D weights. None keeps the model's own code.

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
        return 1.0 if self.schedule is None else self.schedule(step)

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
