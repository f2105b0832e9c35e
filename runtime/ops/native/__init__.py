"""C kernels of operations on CPUs. Where there is no compiler, `torch` does the work."""
