#include "kernel.h"
#include "masking.h"

namespace compsparse {

extern const MaskedTable masked_avx512 = {
    masked_kernels<float, Target<float, 16, 2, 4>>(),
    masked_kernels<double, Target<double, 8, 2, 4>>(),
    masked_kernels<BFloat16, Target<float, 16, 2, 4>>(),
    masked_kernels<Float16, Target<float, 16, 2, 4>>(),
    masking_kernels<uint16_t>(),
    masking_kernels<uint32_t>(),
    masking_kernels<uint64_t>(),
};

}  // namespace compsparse
