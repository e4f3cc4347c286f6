"""Sizes, bytes and memory of a run, from shapes alone."""
