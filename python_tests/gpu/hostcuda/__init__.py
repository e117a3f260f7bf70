"""CUDA C++ of ``csrc/cuda`` on a machine without a GPU: built for the CPU (``shim/``), and compiled by nvcc."""
