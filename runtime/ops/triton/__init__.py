"""Triton kernels, one file per operation. Import a module only where Triton is installed."""
