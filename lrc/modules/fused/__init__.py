"""Modules that are run as fewer, larger kernels for inference."""
