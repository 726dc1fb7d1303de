"""The settings of `conf/plan.yaml` and their checks, none of which needs torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from moe_plugin.apps.launch.bounds import check_bounds
from moe_plugin.apps.launch.config_nodes import check_nodes_in_source
from moe_plugin.apps.launch.signature import check_arguments
from moe_plugin.apps.outputs import check_output_file
from moe_plugin.apps.plan.choices import LAYOUTS, Precision
from moe_plugin.apps.plan.cluster import Cluster, Hardware
from moe_plugin.errors import ConfigError
from moe_plugin.number_checks import check_integer, check_not_negative

_LONGEST = 2**24
"""Tokens of a sequence beyond which a plan takes minutes: a million take 12 s."""


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
        """Check what our classes do not check before torch is imported.

        Raises:
            ConfigError: A number or violation is out of range, a layout is unknown, or `output` cannot be written.
        """
        check_integer("micro_batch", self.micro_batch)
        for key in ("expert_parallel", "sequence_length"):
            check_integer(key, getattr(self, key), or_none=True)
        if (self.sequence_length or 0) > _LONGEST:
            raise ConfigError("sequence_length", f"must be <= {_LONGEST}", self.sequence_length)
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
    settings = Settings(**own)
    cluster_of(config, settings)
    return settings


def cluster_of(config: DictConfig, settings: Settings) -> Cluster:
    """Return the cluster without expert parallelism.

    Args:
        config: The composed configuration.
        settings: Its settings.

    Raises:
        ConfigError: A number is out of range.
    """
    own = cast(dict[str, Any], OmegaConf.to_object(config.hardware))
    del own["_target_"]
    own["devices_per_node"] = settings.devices_per_node
    try:
        return Cluster(Hardware(**own), settings.nodes)
    except ConfigError as error:
        in_group = error.name in own and error.name != "devices_per_node"
        raise error.renamed(f"hardware.{error.name}" if in_group else error.name) from error
