"""Finding the routers of any model by its structure."""
