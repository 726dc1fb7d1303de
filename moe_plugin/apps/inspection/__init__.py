"""The routers of a model and how they would be balanced: `moe-inspect`, and `inspect_model` for a model in memory."""
