"""Sparse attention in the benchmarks: masks by pattern and density, beside the dense kernel and who takes a mask."""
