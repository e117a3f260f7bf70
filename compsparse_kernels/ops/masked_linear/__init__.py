"""Linear layers with an unstructured sparse weight: products and sampled products over a :class:`MaskLayout`."""

from compsparse_kernels.ops.masked_linear.api import masked_linear, sampled_matmul

__all__ = ["masked_linear", "sampled_matmul"]
