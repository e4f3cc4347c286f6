"""Read plans and resolve them for a model."""
