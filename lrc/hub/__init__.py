"""Find, download and load models, and let transformers load compressed checkpoints."""
