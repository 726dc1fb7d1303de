"""How to balance a model: the settings that `balance_` and the callbacks share, checked in one place."""

from __future__ import annotations

import re
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
AuxLoss = Literal["warn", "off", "keep"]

DEFAULT_RULE = Proportional()


def rule_or_default(rule: Rules) -> Rules:
    """Return the rule; the default one for None, as in a configuration without an option of the group 'rule'."""
    return DEFAULT_RULE if rule is None else rule


@dataclass(frozen=True)
class BalanceSettings:
    """How to balance a model; the attributes are arguments of `balance_`.

    Raises:
        ConfigError: If 'frozen_routers', 'experts' or 'aux_loss' is not one of these, 'fused' has kernels that cannot
            run, or 'sites' is not a glob, globs or a predicate.
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
    bias_in_state_dict: bool = False
    aux_loss: AuxLoss = "warn"

    def __post_init__(self) -> None:
        """Check the settings and bring them into one form."""
        if self.frozen_routers not in get_args(FrozenRouters):
            raise ConfigError("frozen_routers", "must be 'auto', 'balance' or 'keep'", self.frozen_routers)
        if self.experts not in ("fused", None):
            raise ConfigError("experts", "must be 'fused' or None", self.experts)
        if self.experts == "fused":
            check_choice()
        if self.aux_loss is False:  # how YAML reads off
            object.__setattr__(self, "aux_loss", "off")
        if self.aux_loss not in get_args(AuxLoss):
            raise ConfigError("aux_loss", "must be 'warn', 'off' or 'keep'", self.aux_loss)
        self._check_sites()
        object.__setattr__(self, "schedule", self.schedule or RateSchedule())
        object.__setattr__(self, "adapters", tuple(self.adapters))

    def wants(self, name: str) -> bool:
        """Return whether the router of this name is to be balanced."""
        if callable(self.sites):
            return self.sites(name)
        return self.sites is None or any(fnmatchcase(name, glob) for glob in self.globs)

    @property
    def globs(self) -> list[str]:
        """The globs of 'sites'; none if it is a predicate or None."""
        if self.sites is None or callable(self.sites):
            return []
        return [self.sites] if isinstance(self.sites, str) else list(self.sites)

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

    def _check_sites(self) -> None:
        if self.sites is None or callable(self.sites):
            return
        is_text = isinstance(self.sites, Sequence) and all(isinstance(glob, str) for glob in self.sites)
        if not is_text or not all(map(_is_glob, self.globs)):
            rule = "must be a glob that is not empty, several, or a predicate; each '[' needs its ']'"
            raise ConfigError("sites", rule, self.sites)


def _is_glob(text: str) -> bool:
    """Return whether the text is not empty and each ``[`` begins a class that ends."""
    return text != "" and "[" not in re.sub(r"\[!?.[^\]]*\]", "", text)
