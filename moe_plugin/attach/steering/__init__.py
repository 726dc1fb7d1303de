"""Watching found routers, and steering what they select."""
