// The CSR products of bind.cpp, for other ways to store a pattern. T is float or double.
#pragma once

#include "../kernels.h"

namespace compsparse {

template <typename T>
void csr_product(const T* x, const MaskedProduct<T>& product);
template <typename T>
void csr_sampled(const T* a, const T* b, const SampledValues<T>& sampled);

}  // namespace compsparse
