"""From the configuration to what is planned: the checks of `conf/plan.yaml`, the workload and the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from math import gcd
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import nn

from moe_plugin.apps.launch.bounds import check_bounds
from moe_plugin.apps.launch.config_nodes import check_nodes_in_source
from moe_plugin.apps.launch.signature import check_arguments
from moe_plugin.apps.models.size import measure
from moe_plugin.apps.plan.cluster import Cluster, Hardware
from moe_plugin.apps.plan.meta_model import Precision, prepare_, routed_experts
from moe_plugin.apps.plan.scale_plan import LAYOUTS
from moe_plugin.apps.plan.workload import Workload
from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_not_negative


@dataclass
class Settings:
    """The keys of `conf/plan.yaml`, which explains them."""

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
            ConfigError: A layout is unknown, a violation is negative, or `output` cannot be written.
        """
        unknown = [name for name in self.layouts if name not in LAYOUTS]
        if unknown or not self.layouts:
            raise ConfigError("layouts", f"must be some of {', '.join(LAYOUTS)}", self.layouts)
        for place, violation in enumerate(self.max_violations):
            check_not_negative(f"max_violations[{place}]", violation)
        if not Path(self.output).absolute().parent.is_dir():
            raise ConfigError("output", "must be in a folder that exists", self.output)
        check_output_file("output", Path(self.output))


def check_settings(config: DictConfig) -> Settings:
    """Return the settings, once every key and scalar fits what takes it.

    Raises:
        ConfigError: One does not.
    """
    check_nodes_in_source(config)
    check_bounds(config)
    values = cast(dict[str, Any], OmegaConf.to_object(config))
    own = {entry.name: values[entry.name] for entry in fields(Settings)}
    check_arguments(Settings, own, "")
    return Settings(**own)


def build_workload(config: DictConfig, settings: Settings) -> Workload:
    """Return what is to be trained.

    Args:
        config: The composed configuration.
        settings: Its settings, checked.

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
    """Return the cluster; experts are spread over as many ranks as possible if the settings leave it open.

    Args:
        config: See `build_workload`.
        settings: See `build_workload`.
        work: What is to be trained.

    Raises:
        ConfigError: A number is out of range, or ranks do not divide.
    """
    own = cast(dict[str, Any], OmegaConf.to_object(config.hardware))
    del own["_target_"]
    own["devices_per_node"] = settings.devices_per_node
    cluster, size = Cluster(Hardware(**own), settings.nodes), settings.expert_parallel
    if "ep" not in settings.layouts:
        return cluster
    if size is None:
        size = gcd(cluster.ranks, *(e.num_experts for e in routed_experts(work.build())))
    return replace(cluster, expert_parallel=size)
