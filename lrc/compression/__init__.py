"""Compression, layer by layer: solve, assemble, measure, refit, finish."""
