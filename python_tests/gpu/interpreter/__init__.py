"""Level L1: kernels under Triton's interpreter, made as strict as a GPU is. Needs a process with TRITON_INTERPRET=1."""
