"""Pictures of the load over experts."""

from moe_plugin.plots.heatmap import load_heatmap

__all__ = ["load_heatmap"]
