"""Kernels for CPUs, compiled at the first start by numba and kept on disk; each has a torch twin."""
