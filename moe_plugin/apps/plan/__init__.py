"""The scale plan: what training a model takes on a cluster, without training it."""

from moe_plugin.apps.plan.cluster import Cluster, Hardware

__all__ = ["Cluster", "Hardware"]
