"""Adapters of routers that cannot be understood from their structure, one file each, in the form users write too."""
