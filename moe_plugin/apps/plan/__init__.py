"""The scale plan: what training a model takes on a cluster, without training it."""

from moe_plugin.apps.plan.cluster import Hardware

__all__ = ["Hardware"]
