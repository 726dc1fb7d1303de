"""Checkpoints that are whole or not there, and that are read without running what they hold."""

from moe_plugin.checkpoints.shards import VerifiedShards
from moe_plugin.checkpoints.verified_io import VerifiedCheckpointIO

__all__ = ["VerifiedCheckpointIO", "VerifiedShards"]
