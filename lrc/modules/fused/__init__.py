"""Run modules as fewer, larger kernels for inference."""
