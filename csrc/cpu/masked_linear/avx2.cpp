#include "kernel.h"
#include "masking.h"

namespace compsparse {

extern const MaskedTable masked_avx2 = {
    masked_kernels<float, Target<float, 8, 4, 4>>(),
    masked_kernels<double, Target<double, 4, 4, 4>>(),
    masked_kernels<BFloat16, Target<float, 8, 4, 4>>(),
    masked_kernels<Float16, Target<float, 8, 4, 4>>(),
    masking_kernels<uint16_t>(),
    masking_kernels<uint32_t>(),
    masking_kernels<uint64_t>(),
};

}  // namespace compsparse
