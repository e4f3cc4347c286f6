"""Speed and memory of models: what is measured, in which modes, how, and what it should come to."""
