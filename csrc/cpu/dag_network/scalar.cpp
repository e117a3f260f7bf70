#include "kernel.h"

namespace compsparse {

extern const DagTable dag_scalar = {
    dag_kernels<float, Target<float, 4, 12>>(),
    dag_kernels<double, Target<double, 2, 12>>(),
    dag_kernels<BFloat16, Target<float, 4, 12>>(),
    dag_kernels<Float16, Target<float, 4, 12>>(),
};

}  // namespace compsparse
