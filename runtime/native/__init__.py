"""C kernels on fp32 tensors of a CPU, compiled together by the machine's own gcc when first asked for.

Where there is no compiler, torch does the work. A row's result never depends on other rows.
"""
