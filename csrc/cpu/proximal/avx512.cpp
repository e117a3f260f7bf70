#include "kernel.h"

namespace compsparse {

extern const ProximalTable proximal_avx512 = {
    proximal_kernels<float, 16>(),
    proximal_kernels<double, 8>(),
    proximal_kernels<BFloat16, 16>(),
    proximal_kernels<Float16, 16>(),
};

}  // namespace compsparse
