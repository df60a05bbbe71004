"""Triton kernels other than the scans: norm and loss. Triton is imported only when a kernel is launched."""
