"""Triton kernel sources; installed as `fastattn.kernels`."""
