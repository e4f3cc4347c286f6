"""Linear algebra on tensors, and nothing else."""
