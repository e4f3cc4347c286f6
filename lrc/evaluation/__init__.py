"""Measures what a checkpoint can do."""

from __future__ import annotations

from lrc.evaluation.perplexity import PROTOCOL_VERSION, Perplexity, evaluate_perplexity

__all__ = ["PROTOCOL_VERSION", "Perplexity", "evaluate_perplexity"]
