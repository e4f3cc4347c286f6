"""Linear algebra on tensors, without modules, files or options."""
