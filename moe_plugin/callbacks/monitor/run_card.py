"""A run described as text for TensorBoard, and its parameters by what they do for a token."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer

from moe_plugin.attach.balanced_model import BalancedModel
from moe_plugin.attach.discovery.routed_experts import find_routed_experts
from moe_plugin.errors import ConfigError
from moe_plugin.metrics.router_names import short_names


@dataclass(frozen=True)
class ActiveParameters:
    """Parameters of a model by what they do for one token.

    Attributes:
        total: All parameters.
        active: Those that one token uses.
        routed: Those of `active` that are in routed experts.
    """

    total: int
    active: int
    routed: int

    @property
    def expert_share(self) -> float:
        """Share of a token's parameters (and roughly of its operations) that expert parallelism spreads over ranks."""
        return self.routed / self.active if self.active else 0.0


def active_parameters(model: torch.nn.Module) -> ActiveParameters | None:
    """Count the parameters that one token uses; None if the experts of a router are not found or are sharded."""
    total = sum(parameter.numel() for parameter in model.parameters())
    try:
        experts = find_routed_experts(model)
    except ConfigError:
        return None
    if not experts:
        return None
    routed = sum(each.num_active_parameters for each in experts)
    return ActiveParameters(total, total - sum(each.num_parameters for each in experts) + routed, routed)


def run_card(trainer: Trainer, pl_module: LightningModule, balanced: BalancedModel) -> str:
    """Describe a run in Markdown: model, routers, training, machine.

    Args:
        trainer: The run's trainer.
        pl_module: The model.
        balanced: Its routers.
    """
    size = active_parameters(pl_module)
    first = next(iter(balanced.values()))
    experts = sorted({site.num_routed for site in balanced.values()})
    rows = {
        "model": type(pl_module).__name__,
        "routers": f"{len(balanced)} x {type(first.router).__name__}, {experts} experts, top {first.top_k}",
        "bias": f"the model's own `{first.bias_place.name}`" if first.host_owns_bias else "ours",
        "rule": f"`{balanced.settings.rule}`",
        "parameters": f"{size.total:,} total, {size.active:,} active per token" if size else "unknown",
        "training": f"{trainer.world_size} x {type(trainer.strategy).__name__}, {trainer.precision}, "
        f"accumulation {trainer.accumulate_grad_batches}, max_steps {trainer.max_steps}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}",
        "machine": f"{platform.system()} {platform.machine()}, {trainer.strategy.root_device}",
    }
    lines = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    names = "\n".join(f"| {short} | `{name}` |" for name, short in short_names(balanced).items())
    return f"| | |\n|---|---|\n{lines}\n\n| layer | router |\n|---|---|\n{names}"
