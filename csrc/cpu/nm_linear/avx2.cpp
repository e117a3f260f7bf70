#include "kernel.h"

namespace compsparse {

extern const NMTable nm_avx2 = {
    nm_kernels<float, Target<float, 8, 4>, Target<float, 8, 4>>(),
    nm_kernels<double, Target<double, 4, 4>, Target<double, 4, 4>>(),
};

}  // namespace compsparse
