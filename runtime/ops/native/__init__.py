"""C kernels of operations on fp32 tensors of a CPU, one file per operation, compiled together when first asked for.

Where there is no compiler, torch does the work. A row's result never depends on other rows.
"""
