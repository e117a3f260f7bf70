#include "kernel.h"

namespace compsparse {

extern const MaskedTable masked_avx2 = {
    masked_kernels<float, Target<float, 8, 8>>(),
    masked_kernels<double, Target<double, 4, 8>>(),
};

}  // namespace compsparse
