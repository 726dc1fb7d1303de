"""The mixin that turns a host's router into a balanced one."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_plugin.adapters.class_swap import Mixin, swap_, unswap_
from moe_plugin.adapters.site import Site
from moe_plugin.adapters.top_k import Selection, TopKIntercept


class BalancedRouter(Mixin):
    """Runs the host's own forward and reports to the site what it selected."""

    _moe_site: Site

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's forward, with its expert selection seen and biased."""
        site = self._moe_site
        bias_E = None if site.host_owns_bias else site.bias
        seen: list[Selection] = []
        with TopKIntercept(site.num_experts, site.top_k, bias_E, site.zeros_masked, seen):
            output = super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        site.record_(seen, training=self.training)  # pyright: ignore[reportAttributeAccessIssue]
        return output


def attach_(module: nn.Module, site: Site) -> None:
    """Make ``module`` report to ``site``."""
    module.__dict__["_moe_site"] = site
    swap_(module, BalancedRouter)


def detach_(module: nn.Module) -> None:
    """Undo `attach_`."""
    unswap_(module, BalancedRouter)
    del module.__dict__["_moe_site"]
