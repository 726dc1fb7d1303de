"""From the configuration to what is planned: checks `conf/plan.yaml` and builds the workload and the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import gcd
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import nn

from moe_plugin.apps.launch.build import build_model_on_meta
from moe_plugin.apps.launch.quiet_logs import quiet
from moe_plugin.apps.launch.signature import check_arguments
from moe_plugin.apps.launch.validate_config import attempt, locate_target, nodes, present
from moe_plugin.apps.models.size import measure
from moe_plugin.apps.plan.cluster import Cluster, Hardware
from moe_plugin.apps.plan.meta_model import Precision, prepare_, routed_experts
from moe_plugin.apps.plan.scale_plan import LAYOUTS
from moe_plugin.apps.plan.workload import Workload
from moe_plugin.errors import ConfigError


@dataclass
class Settings:
    """See `conf/plan.yaml`, which says what each key is."""

    nodes: int
    devices_per_node: int
    expert_parallel: int | None
    micro_batch: int
    sequence_length: int | None
    precision: Precision
    activation_checkpointing: bool
    output: str
    layouts: list[str] = field(default_factory=list)
    max_violations: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the lists.

        Raises:
            ConfigError: A layout is unknown, or a violation negative.
        """
        unknown = [name for name in self.layouts if name not in LAYOUTS]
        if unknown or not self.layouts:
            raise ConfigError(f"'layouts' must be some of {', '.join(LAYOUTS)}, got {self.layouts}.")
        if any(not isinstance(v, int | float) or v < 0 for v in self.max_violations):
            raise ConfigError(f"'max_violations' must be numbers >= 0, got {self.max_violations}.")
        if not Path(self.output).absolute().parent.is_dir():
            raise ConfigError(f"'output' must lie in a folder that exists, got {self.output!r}.")


def check_settings(config: DictConfig) -> Settings:
    """Return the settings, once every key and scalar fits what takes it.

    Raises:
        ConfigError: One does not.
    """
    values = cast(dict[str, Any], OmegaConf.to_object(config))
    own = {entry.name: values[entry.name] for entry in fields(Settings)}
    check_arguments(Settings, own, "")
    for key, node in nodes(config):
        check_arguments(locate_target(node, key), present(node), key)
    return Settings(**own)


def build_workload(config: DictConfig, settings: Settings) -> Workload:
    """Return what is to be trained.

    Raises:
        ConfigError: The model cannot be built, or a number is out of range.
    """

    def build() -> nn.Module:
        with quiet():
            model = build_model_on_meta(config)
        return prepare_(model, settings.precision, activation_checkpointing=settings.activation_checkpointing)

    attempt(lambda _: build(), config, config, "model")
    length = settings.sequence_length
    return Workload(
        build=build,
        micro_batch=settings.micro_batch,
        sequence_length=measure(build()).context_length if length is None else length,
        precision=settings.precision,
        activation_checkpointing=settings.activation_checkpointing,
    )


def build_cluster(config: DictConfig, settings: Settings, work: Workload) -> Cluster:
    """Where, with as many ranks per group of experts as can be where the settings leave it open.

    Raises:
        ConfigError: A number is out of range, or ranks do not divide.
    """
    own = cast(dict[str, Any], OmegaConf.to_object(config.hardware))
    own = {key: value for key, value in own.items() if key != "_target_"}
    hardware = Hardware(**{**own, "devices_per_node": settings.devices_per_node})
    ranks = Cluster(hardware, settings.nodes).ranks
    if "ep" not in settings.layouts:
        return Cluster(hardware, settings.nodes)
    if settings.expert_parallel is not None:
        return Cluster(hardware, settings.nodes, settings.expert_parallel)
    return Cluster(
        hardware, settings.nodes, gcd(ranks, *(e.num_experts for e in routed_experts(work.build())))
    )
