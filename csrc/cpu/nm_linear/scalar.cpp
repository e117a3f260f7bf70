#include "kernel.h"

namespace compsparse {

extern const NMTable nm_scalar = {
    nm_kernels<float, Target<float, 4, 4>, Target<float, 4, 4>>(),
    nm_kernels<double, Target<double, 2, 4>, Target<double, 2, 4>>(),
};

}  // namespace compsparse
