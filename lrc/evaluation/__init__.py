"""Evaluate checkpoints: perplexity, token-by-token divergence between two models, zero-shot tasks."""

from __future__ import annotations

from lrc.evaluation.perplexity import PROTOCOL_VERSION, Perplexity, evaluate_perplexity

__all__ = ["PROTOCOL_VERSION", "Perplexity", "evaluate_perplexity"]
