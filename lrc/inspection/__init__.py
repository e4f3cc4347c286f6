"""Inspect a model: spectra, moments, predicted errors, and the errors of an output."""
