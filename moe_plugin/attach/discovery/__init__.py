"""Finding the routers of a model that nobody here has seen."""
