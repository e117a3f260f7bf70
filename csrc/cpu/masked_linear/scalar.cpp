#include "kernel.h"
#include "masking.h"

namespace compsparse {

extern const MaskedTable masked_scalar = {
    masked_kernels<float, Target<float, 4, 4, 4>>(),
    masked_kernels<double, Target<double, 2, 4, 4>>(),
    masked_kernels<BFloat16, Target<float, 4, 4, 4>>(),
    masked_kernels<Float16, Target<float, 4, 4, 4>>(),
    masking_kernels<uint16_t>(),
    masking_kernels<uint32_t>(),
    masking_kernels<uint64_t>(),
};

}  // namespace compsparse
