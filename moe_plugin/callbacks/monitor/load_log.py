"""The load since it was last logged, as scalars, for training loops that are not Lightning's."""

from __future__ import annotations

from torch import nn

from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.callbacks.monitor.load_tags import Detail, check_detail, shown, training_scalars
from moe_plugin.callbacks.monitor.run_card import active_parameters
from moe_plugin.callbacks.monitor.training_watch import bias_ranges
from moe_plugin.metrics import LoadWindow
from moe_plugin.metrics.router_names import short_names
from moe_plugin.types import LoadRecord


class LoadLog:
    """A window of optimizer steps that ends when the loop logs.

    Args:
        detail: Which scalars are logged, see `LoadMonitor`.

    Raises:
        ConfigError: If it is neither 'brief' nor 'full'.
    """

    def __init__(self, detail: Detail) -> None:
        """Check the setting."""
        check_detail(detail)
        self._detail: Detail = detail

    def start_(self, model: nn.Module, balanced: BalancedModel) -> None:
        """Begin a run.

        Args:
            model: The model.
            balanced: Its routers.
        """
        size = active_parameters(model)
        self._expert_share = 0.0 if size is None else size.expert_share
        self._window = LoadWindow({name: site.num_routed for name, site in balanced.items()})
        self._short = short_names(balanced)
        self._record: LoadRecord | None = None

    def add_(self, record: LoadRecord) -> None:
        """Take in an optimizer step, without waiting for the device."""
        self._window.add_(record.counts)
        self._record = record

    def take(self) -> dict[str, float]:
        """Return the scalars of the steps since the last call; none without a step."""
        if self._record is None:
            return {}
        ranges, self._record = bias_ranges(self._record.bias), None
        loads = self._window.layer_loads()
        self._window.reset_()
        scalars = training_scalars(loads, ranges, {}, self._expert_share)
        return shown(scalars, self._short, self._detail)
