"""Checks, before anything is created, that our fused experts can compute those of a run's model."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import DictConfig

from moe_plugin.apps.launch.build import LOSS_FREE, build_model_on_meta, to_plain
from moe_plugin.apps.launch.expert_parallel import expert_parallel_size
from moe_plugin.attach.balance import balance_
from moe_plugin.errors import ConfigError


def check_fused_experts(config: DictConfig) -> None:
    """Check that our experts can replace the model's, if the balancing callback is to do that.

    Raises:
        ConfigError: The strategy spreads the experts over processes before they could be replaced.
        AttachError: Some cannot be replaced.
    """
    callback = (config.callbacks or {}).get(LOSS_FREE)
    if callback is None or callback.get("experts") != "fused":
        return
    size = expert_parallel_size(config)
    if size > 1:
        rule = f"must be null when experts are spread over processes (expert_parallel_size is {size})"
        fix = "Leave it out, or choose a strategy that keeps them together, such as strategy=fsdp."
        raise ConfigError("experts", rule, "fused", fix)
    adapters = [instantiate(adapter) for adapter in callback.get("adapters") or ()]
    sites = to_plain(callback.get("sites"))
    balance_(build_model_on_meta(config), sites=sites, adapters=adapters, experts="fused")
