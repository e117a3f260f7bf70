#include "kernel.h"

namespace compsparse {

extern const ProximalTable proximal_avx2 = {
    proximal_kernels<float, 8>(),
    proximal_kernels<double, 4>(),
    proximal_kernels<BFloat16, 8>(),
    proximal_kernels<Float16, 8>(),
};

}  // namespace compsparse
