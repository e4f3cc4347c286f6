"""The texts that a run draws, text that the model writes, and whether there is enough of it."""
