// What bind.cpp files need from tensors beyond LibTorch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "types.h"

namespace compsparse {

// The usual tensor is contiguous already; asking costs less than a call through the dispatcher.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline Activation activation_from(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "silu", "unknown activation reached the kernel: ", name);
  return Activation::silu;
}

// A new tensor like `x`, of the given sizes, and of another dtype if one is given. torch::stable::new_empty means the
// same, but looks the operator up by its name at every call, which costs more than the allocation.
inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& x, std::initializer_list<int64_t> sizes,
                                        std::optional<int32_t> dtype = std::nullopt) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(x.get(), sizes.begin(), sizes.size(), dtype ? &*dtype : nullptr,
                                                   nullptr, nullptr, 0, nullptr, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace compsparse
