"""From the settings to what is planned: the workload and the cluster."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

from omegaconf import DictConfig
from torch import nn

from moe_plugin.apps.launch.build import build_model_on_meta
from moe_plugin.apps.launch.config_nodes import check_nodes
from moe_plugin.apps.launch.quiet_logs import quiet
from moe_plugin.apps.launch.validate_config import attempt
from moe_plugin.apps.models.size import measure
from moe_plugin.apps.plan.cluster import Cluster
from moe_plugin.apps.plan.meta_model import prepare_, routed_experts
from moe_plugin.apps.plan.settings import Settings, cluster_of
from moe_plugin.apps.plan.workload import Workload


def build_workload(config: DictConfig, settings: Settings) -> Workload:
    """Return what is to be trained.

    Args:
        config: The composed configuration.
        settings: Its settings, checked.

    Raises:
        ConfigError: The model cannot be built, or a number is out of range.
    """
    check_nodes(config)

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
    cluster, size = cluster_of(config, settings), settings.expert_parallel
    if "ep" not in settings.layouts:
        return cluster
    if size is None:
        size = gcd(cluster.ranks, *(e.num_experts for e in routed_experts(work.build())))
    return replace(cluster, expert_parallel=size)
