// The boundary between torch and the arithmetic of proximal.
#pragma once

#include "../types.h"

namespace compsparse {

enum class Penalty : int32_t { none, l1, group_l1, hard };

// What follows a step of an optimizer. `bound` is taken from a weight (l1) or, times the root of a group's size, from
// its norm; or it is the least weight that is kept (hard). Groups are blocks of the matrix [rows, columns]; those side
// by side in `panel` columns, a multiple of block_in, are done together. Panels are counted along the rows of blocks.
template <typename T>
struct ProximalMap {
  Penalty penalty;
  double bound;
  int64_t rows;
  int64_t columns;
  int64_t block_out;
  int64_t block_in;
  int64_t panel;
};

// param -= lr * d: d is the gradient with decay * param and sign * sign(param), or what momentum makes of it.
template <typename T>
struct SgdStep {
  T* param;
  const T* grad;
  T* buffer;  // or null: no momentum
  Sum<T> lr;
  Sum<T> momentum;
  Sum<T> share;  // of the gradient in the buffer
  Sum<T> decay;
  Sum<T> sign;
  bool nesterov;
  bool first;  // the buffer holds nothing yet
};

// param = keep * param - rate * mean / (sqrt(square) / root + eps)
template <typename T>
struct AdamWStep {
  T* param;
  const T* grad;
  T* mean;
  T* square;
  Sum<T> keep;
  Sum<T> rate;
  Sum<T> mean_share;  // of the gradient in the mean, of its square in the mean square
  Sum<T> square_keep;
  Sum<T> square_share;
  Sum<T> root;
  Sum<T> eps;
};

// Parameters and state are read and written once. `part` counts weights, or panels where the penalty has groups; then
// scratch has (block_out + 1) * panel numbers, squares has `panel`.
template <typename T>
struct ProximalKernels {
  void (*sgd)(const SgdStep<T>&, const ProximalMap<T>&, Range part, Sum<T>* scratch, double* squares);
  void (*adamw)(const AdamWStep<T>&, const ProximalMap<T>&, Range part, Sum<T>* scratch, double* squares);
};

struct ProximalTable {
  ProximalKernels<float> f32;
  ProximalKernels<double> f64;
  ProximalKernels<BFloat16> bf16;
  ProximalKernels<Float16> f16;
};

extern const ProximalTable proximal_scalar, proximal_avx2, proximal_avx512;

}  // namespace compsparse
