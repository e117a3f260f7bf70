#include "kernel.h"

namespace compsparse {

extern const MaskedTable masked_avx512 = {
    masked_kernels<float, Target<float, 16, 4>>(),
    masked_kernels<double, Target<double, 8, 4>>(),
};

}  // namespace compsparse
