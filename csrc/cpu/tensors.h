// What bind.cpp files need from tensors beyond LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace compsparse {

// The usual tensor is contiguous already; asking costs less than a call through the dispatcher.
inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

}  // namespace compsparse
