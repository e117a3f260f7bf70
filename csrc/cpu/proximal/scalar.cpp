#include "kernel.h"

namespace compsparse {

extern const ProximalTable proximal_scalar = {
    proximal_kernels<float, 4>(),
    proximal_kernels<double, 2>(),
    proximal_kernels<BFloat16, 4>(),
    proximal_kernels<Float16, 4>(),
};

}  // namespace compsparse
