#include "kernel.h"

namespace compsparse {

extern const NMTable nm_avx512 = {
    nm_kernels<float, Target<float, 16, 4>, Target<float, 16, 8>>(),
    nm_kernels<double, Target<double, 8, 4>, Target<double, 8, 8>>(),
};

}  // namespace compsparse
