"""The CPU kernels: C++ behind a plain C interface, loaded from the file that the build put here."""
