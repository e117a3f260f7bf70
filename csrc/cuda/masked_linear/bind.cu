// masked_linear and sampled_matmul at key CUDA: unpack, allocate scratch, launch on torch's current stream.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>

#include "../../cpu/tensors.h"
#include "launch.cuh"

namespace compsparse::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the device of a tensor the current one while it lives.
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls visit.template operator()<T>() with the element type of a tensor.
template <typename Visit>
void with_element_type(const Tensor& tensor, const Visit& visit) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return visit.template operator()<float>();
    case ScalarType::Double:
      return visit.template operator()<double>();
    case ScalarType::Half:
      return visit.template operator()<__half>();
    case ScalarType::BFloat16:
      return visit.template operator()<__nv_bfloat16>();
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
  }
}

// Calls visit(idx) with columns of their own width.
template <typename Visit>
void with_columns(const Tensor& idx, const Visit& visit) {
  const bool is_narrow = idx.scalar_type() == ScalarType::Short;
  STD_TORCH_CHECK(is_narrow || idx.scalar_type() == ScalarType::Int, "idx: expected int16 or int32");
  is_narrow ? visit(data<const int16_t>(idx)) : visit(data<const int32_t>(idx));
}

// So many numbers of the type in which T is summed.
template <typename T>
Tensor new_sums(const Tensor& like, int64_t count) {
  constexpr ScalarType type = std::is_same_v<Sum<T>, double> ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(like, {count}, type);
}

template <typename T>
Tensor ordered_values(const Tensor& values, const Tensor& perm, cudaStream_t stream) {
  const int64_t count = perm.size(0);
  Tensor ordered = torch::stable::new_empty(values, {count});
  if (perm.scalar_type() == ScalarType::Long)
    launch_gather(data<const T>(values), data<const int64_t>(perm), count, data<T>(ordered), stream);
  else
    launch_gather(data<const T>(values), data<const int32_t>(perm), count, data<T>(ordered), stream);
  return ordered;
}

Tensor masked_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& ptr,
                     const Tensor& idx, const std::optional<Tensor>& perm, int64_t out_features) {
  const OnDeviceOf device(x);
  const Tensor input = as_contiguous(x), weights = as_contiguous(values);
  std::optional<Tensor> offset;
  if (bias) offset = as_contiguous(*bias);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  with_element_type(x, [&]<typename T>() {
    const Tensor ordered = perm ? ordered_values<T>(weights, *perm, device.stream) : weights;
    const Tensor x_scratch = torch::stable::new_empty(x, {panel_size<T>(x.size(0), x.size(1))});
    const Tensor y_scratch = torch::stable::new_empty(x, {panel_size<T>(x.size(0), out_features)});
    const int64_t piece_sums = pieces_size<T>(x.size(0), x.size(1), out_features, idx.size(0));
    const Tensor pieces_scratch = new_sums<T>(x, piece_sums);
    with_columns(idx, [&]<typename Index>(const Index* columns) {
      const MaskedLinearCall<T, Index> call = {
          .x = data<const T>(input),
          .values = data<const T>(ordered),
          .bias = offset ? data<const T>(*offset) : nullptr,
          .y = data<T>(y),
          .ptr = data<const int64_t>(ptr),
          .idx = columns,
          .batch = x.size(0),
          .in_features = x.size(1),
          .out_features = out_features,
          .entries = idx.size(0),
          .x_scratch = data<T>(x_scratch),
          .y_scratch = data<T>(y_scratch),
          .pieces_scratch = data<Sum<T>>(pieces_scratch),
      };
      launch_masked_linear(call, device.stream);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

Tensor sampled_matmul(const Tensor& a, const Tensor& b, const Tensor& ptr, const Tensor& idx) {
  const OnDeviceOf device(a);
  const Tensor left = as_contiguous(a), right = as_contiguous(b);
  Tensor values = torch::stable::new_empty(a, {idx.size(0)});
  with_element_type(a, [&]<typename T>() {
    const Tensor a_scratch = torch::stable::new_empty(a, {panel_size<T>(a.size(0), a.size(1))});
    const Tensor b_scratch = torch::stable::new_empty(a, {panel_size<T>(a.size(0), b.size(1))});
    with_columns(idx, [&]<typename Index>(const Index* columns) {
      const SampledMatmulCall<T, Index> call = {
          .a = data<const T>(left),
          .b = data<const T>(right),
          .values = data<T>(values),
          .ptr = data<const int64_t>(ptr),
          .idx = columns,
          .batch = a.size(0),
          .in_features = b.size(1),
          .out_features = a.size(1),
          .entries = idx.size(0),
          .a_scratch = data<T>(a_scratch),
          .b_scratch = data<T>(b_scratch),
      };
      launch_sampled_matmul(call, device.stream);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return values;
}

}  // namespace
}  // namespace compsparse::cuda

STABLE_TORCH_LIBRARY_IMPL(compsparse, CUDA, m) {
  m.impl("masked_linear", TORCH_BOX(&compsparse::cuda::masked_linear));
  m.impl("sampled_matmul", TORCH_BOX(&compsparse::cuda::sampled_matmul));
}
