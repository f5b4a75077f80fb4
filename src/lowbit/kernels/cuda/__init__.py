"""CUDA C++ kernels, compiled by NVRTC when a layer first runs and kept in the user's cache."""
