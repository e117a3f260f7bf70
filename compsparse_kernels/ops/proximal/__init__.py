"""Steps of an optimizer fused with the proximal map of a penalty, in place."""

from compsparse_kernels.ops.proximal.api import proximal_adamw_, proximal_sgd_

__all__ = ["proximal_adamw_", "proximal_sgd_"]
