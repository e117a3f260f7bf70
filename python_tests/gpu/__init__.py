"""Evidence about GPU kernels on a machine without a GPU; the levels are in README.md beside this file."""
