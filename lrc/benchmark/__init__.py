"""Measure the speed and memory of models, and compute the bytes and operations that bound them."""
