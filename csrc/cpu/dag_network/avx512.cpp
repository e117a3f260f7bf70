#include "kernel.h"

namespace compsparse {

extern const DagTable dag_avx512 = {
    dag_kernels<float, Target<float, 16, 24>>(),
    dag_kernels<double, Target<double, 8, 24>>(),
    dag_kernels<BFloat16, Target<float, 16, 24>>(),
    dag_kernels<Float16, Target<float, 16, 24>>(),
};

}  // namespace compsparse
