"""Kernels in CUDA C++ for Hopper and head width 128, compiled when first used by the compiler torch brings along."""
