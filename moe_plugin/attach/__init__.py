"""Attaching to the routers of any model without editing it."""
