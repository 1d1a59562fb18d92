"""Triton kernels, one module an op; installed as `ffengine.kernels`."""
