"""Spreading any model over processes: its layers, their sharding, and parameters without storage."""

from moe_plugin.sharding.layers import find_layers
from moe_plugin.sharding.materialize import materialize_
from moe_plugin.sharding.shard import shard_

__all__ = ["find_layers", "materialize_", "shard_"]
