#include "kernel.h"

namespace compsparse {

extern const MaskedTable masked_scalar = {
    masked_kernels<float, Target<float, 4, 8>>(),
    masked_kernels<double, Target<double, 2, 8>>(),
};

}  // namespace compsparse
