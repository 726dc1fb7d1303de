"""Adapters of routers whose structure does not show how they route, written as users write theirs; one per file."""
