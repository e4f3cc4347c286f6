"""Statistics of activations: what is summed over the calibration tokens, and how it is observed."""

COLLECTORS = frozenset({"moments", "attention", "attention_samples"})
