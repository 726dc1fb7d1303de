"""The routers of a model and how they would be balanced: `moe-inspect`, and `inspect_model` for a model in memory."""

from moe_plugin.apps.inspection.inspection_table import inspection_table
from moe_plugin.apps.inspection.sites import BiasStatistics, inspect_model

__all__ = ["BiasStatistics", "inspect_model", "inspection_table"]
