"""CUDA C++ kernels, compiled at first use: only speed lives here."""
