"""Maths that several methods use."""
