"""What would be balanced in a model, and how: `moe-inspect`, and `inspect_model` for a model in memory."""

from moe_plugin.inspection.sites import BiasStatistics, Inspection, RoutingSite, inspect_model
from moe_plugin.inspection.table import inspection_table

__all__ = ["BiasStatistics", "Inspection", "RoutingSite", "inspect_model", "inspection_table"]
