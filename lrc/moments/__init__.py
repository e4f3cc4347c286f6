"""Statistics of activations and gradients: what is summed over the calibration tokens, and how it is observed."""

COLLECTORS = frozenset({"moments", "attention", "attention_samples", "gradients"})
