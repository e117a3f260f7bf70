"""Linear layers with an unstructured sparse weight: products and sampled products over a :class:`MaskLayout`."""

from compsparse_kernels.layouts.costs import calibrate_with
from compsparse_kernels.ops.masked_linear.api import masked_linear, sampled_matmul
from compsparse_kernels.ops.masked_linear.calibration import calibrate

calibrate_with(calibrate)

__all__ = ["masked_linear", "sampled_matmul"]
