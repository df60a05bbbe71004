"""The operators as Triton kernels, for GPUs. Nothing here is imported before a kernel is asked for."""
