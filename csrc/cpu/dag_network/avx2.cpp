#include "kernel.h"

namespace compsparse {

extern const DagTable dag_avx2 = {
    dag_kernels<float, Target<float, 8, 12>>(),
    dag_kernels<double, Target<double, 4, 12>>(),
    dag_kernels<BFloat16, Target<float, 8, 12>>(),
    dag_kernels<Float16, Target<float, 8, 12>>(),
};

}  // namespace compsparse
