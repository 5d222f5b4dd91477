"""Portable GPU kernels in Triton, for NVIDIA, AMD and Intel: compiled at first use, without a toolkit."""
