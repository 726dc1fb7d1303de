"""Checks that balancing does to a model what it should and nothing else: one battery for tests and for users."""
