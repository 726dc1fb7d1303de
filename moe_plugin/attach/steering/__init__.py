"""Watching a found router, and steering what it selects."""
