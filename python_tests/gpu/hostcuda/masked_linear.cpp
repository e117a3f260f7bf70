#include "masked_linear.h"

#include "../../../csrc/cuda/masked_linear/launch.cuh"
#include "buffer.h"

namespace {

using namespace compsparse::cuda;

constexpr int no_stream = 0;

template <typename Visit>
void with_element_type(int type, const Visit& visit) {
  switch (type) {
    case Float32:
      return visit.template operator()<float>();
    case Float64:
      return visit.template operator()<double>();
    case Float16:
      return visit.template operator()<__half>();
    case BFloat16:
      return visit.template operator()<__nv_bfloat16>();
    default:
      throw std::invalid_argument("element_type: expected 0 to 3");
  }
}

// Calls visit(idx) with columns of their own width.
template <typename Visit>
void with_columns(const void* idx, int wide_idx, const Visit& visit) {
  wide_idx ? visit(static_cast<const int32_t*>(idx)) : visit(static_cast<const int16_t*>(idx));
}

template <typename T>
void gather_values(const void* values, const void* perm, int wide_perm, const Buffer<T>& ordered) {
  const T* const from = static_cast<const T*>(values);
  if (wide_perm)
    launch_gather(from, static_cast<const int64_t*>(perm), ordered.size(), ordered.data(), no_stream);
  else
    launch_gather(from, static_cast<const int32_t*>(perm), ordered.size(), ordered.data(), no_stream);
}

}  // namespace

void hostcuda_seed(unsigned seed) { cs::seed(seed); }

void hostcuda_masked_linear(int element_type, const void* x, const void* values, const void* bias, void* y,
                            const int64_t* ptr, const void* idx, int wide_idx, const void* perm, int wide_perm,
                            int64_t batch, int64_t in_features, int64_t out_features, int64_t entries) {
  with_element_type(element_type, [&]<typename T>() {
    const Buffer<T> ordered(perm ? entries : 0);
    if (perm) gather_values(values, perm, wide_perm, ordered);
    const Buffer<T> x_scratch(panel_size<T>(batch, in_features)), y_scratch(panel_size<T>(batch, out_features));
    const Buffer<Sum<T>> pieces_scratch(pieces_size<T>(batch, in_features, out_features, entries));
    with_columns(idx, wide_idx, [&]<typename Index>(const Index* columns) {
      const MaskedLinearCall<T, Index> call = {
          .x = static_cast<const T*>(x),
          .values = perm ? ordered.data() : static_cast<const T*>(values),
          .bias = static_cast<const T*>(bias),
          .y = static_cast<T*>(y),
          .ptr = ptr,
          .idx = columns,
          .batch = batch,
          .in_features = in_features,
          .out_features = out_features,
          .entries = entries,
          .x_scratch = x_scratch.data(),
          .y_scratch = y_scratch.data(),
          .pieces_scratch = pieces_scratch.data(),
      };
      launch_masked_linear(call, no_stream);
    });
  });
}

void hostcuda_sampled_matmul(int element_type, const void* a, const void* b, void* values, const int64_t* ptr,
                             const void* idx, int wide_idx, int64_t batch, int64_t in_features, int64_t out_features,
                             int64_t entries) {
  with_element_type(element_type, [&]<typename T>() {
    const Buffer<T> a_scratch(panel_size<T>(batch, out_features)), b_scratch(panel_size<T>(batch, in_features));
    with_columns(idx, wide_idx, [&]<typename Index>(const Index* columns) {
      const SampledMatmulCall<T, Index> call = {
          .a = static_cast<const T*>(a),
          .b = static_cast<const T*>(b),
          .values = static_cast<T*>(values),
          .ptr = ptr,
          .idx = columns,
          .batch = batch,
          .in_features = in_features,
          .out_features = out_features,
          .entries = entries,
          .a_scratch = a_scratch.data(),
          .b_scratch = b_scratch.data(),
      };
      launch_sampled_matmul(call, no_stream);
    });
  });
}
