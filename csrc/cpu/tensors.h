// What bind.cpp files need from tensors beyond LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "kernels.h"

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

}  // namespace compsparse
