"""Evaluate checkpoints: perplexity, token-by-token divergence between two models, zero-shot tasks."""
