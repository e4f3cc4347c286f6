"""Read, match, hash and stage checkpoints."""
