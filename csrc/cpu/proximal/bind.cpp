// proximal_sgd_ and proximal_adamw_ at key CPU: unpack, round what is derived from the settings once, split the weights
// or groups over threads, call the chosen table.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>

#include "../kernels.h"
#include "../partition.h"
#include "../scratch.h"
#include "../tensors.h"

namespace compsparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Penalty penalty_from(const std::string& name) {
  if (name == "none") return Penalty::none;
  if (name == "l1") return Penalty::l1;
  if (name == "group_l1") return Penalty::group_l1;
  STD_TORCH_CHECK(name == "hard", "unknown penalty reached the kernel: ", name);
  return Penalty::hard;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

int64_t blocks(int64_t total, int64_t block) { return (total + block - 1) / block; }

// What all steps share: the tensor as a matrix, and its groups.
struct Settings {
  Penalty penalty;
  double bound;
  int64_t block_out;
  int64_t block_in;

  template <typename T>
  ProximalMap<T> map(const Tensor& param) const {
    // Rows of 512 are read as a stream; a panel of tall groups is narrower, so that it stays in cache.
    const int64_t wide = std::clamp<int64_t>((1 << 16) / block_out, 64, 512);
    const int64_t rows = param.dim() == 0 ? 1 : param.size(0), columns = param.numel() / rows;
    const int64_t panel = std::min(std::max<int64_t>(1, wide / block_in), blocks(columns, block_in)) * block_in;
    return {penalty, bound, rows, columns, block_out, block_in, panel};
  }
};

// Shares begin at multiples of a cache line, so that where a vector begins does not depend on their number.
template <typename T, class Step, class Kernel>
void run(const Step& step, const ProximalMap<T>& map, const Kernel& kernel) {
  constexpr int64_t line = 64, cost = 8;  // multiply-adds that a step's divisions and traffic are worth
  const int64_t size = map.rows * map.columns;
  int64_t parts = parts_for(size * cost);
  if (map.penalty != Penalty::group_l1) {
    return for_each_part(parts, [&](int64_t part) {
      const Range lines = equal_share(blocks(size, line), part, parts);
      kernel(step, map, {lines.begin * line, std::min(lines.end * line, size)}, nullptr, nullptr);
    });
  }
  const int64_t panels = blocks(map.rows, map.block_out) * blocks(map.columns, map.panel);
  const int64_t squares = blocks(map.panel, line) * line, room = (map.block_out + 1) * squares;
  parts = std::min(parts, panels);
  const auto numbers = make_scratch<Sum<T>>(parts * room);
  const auto sums = make_scratch<double>(parts * squares);
  for_each_part(parts, [&](int64_t part) {
    kernel(step, map, equal_share(panels, part, parts), numbers.get() + part * room, sums.get() + part * squares);
  });
}

// Calls body.operator()<T>(kernels of T).
template <class Body>
void with_dtype(const Tensor& param, const Body& body) {
  const ProximalTable& table = *kernels().proximal;
  switch (param.scalar_type()) {
    case ScalarType::Double:
      return body(table.f64);
    case ScalarType::BFloat16:
      return body(table.bf16);
    case ScalarType::Half:
      return body(table.f16);
    default:
      return body(table.f32);
  }
}

void proximal_sgd_(const Tensor& param, const Tensor& grad, const std::optional<Tensor>& buffer, double lr,
                   double momentum, double dampening, double weight_decay, bool nesterov, bool first,
                   std::string penalty, double strength, double beta, int64_t block_out, int64_t block_in) {
  if (param.numel() == 0) return;
  const Tensor slope = as_contiguous(grad);
  const Penalty kind = penalty_from(penalty);
  const bool is_hard = kind == Penalty::hard;
  const Settings settings = {kind, (is_hard ? beta : lr) * strength, block_out, block_in};
  with_dtype(param, [&]<typename T>(const ProximalKernels<T>& kernel) {
    const SgdStep<T> step = {
        .param = data<T>(param),
        .grad = data<const T>(slope),
        .buffer = buffer ? data<T>(*buffer) : nullptr,
        .lr = Sum<T>(lr),
        .momentum = Sum<T>(momentum),
        .share = Sum<T>(1 - dampening),
        .decay = Sum<T>(weight_decay),
        .sign = Sum<T>(is_hard ? strength : 0),
        .nesterov = nesterov,
        .first = first,
    };
    run<T>(step, settings.map<T>(param), kernel.sgd);
  });
}

void proximal_adamw_(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                     int64_t number, double lr, double beta1, double beta2, double eps, double weight_decay,
                     std::string penalty, double strength, int64_t block_out, int64_t block_in) {
  if (param.numel() == 0) return;
  const Tensor slope = as_contiguous(grad);
  const Settings settings = {penalty_from(penalty), lr * strength, block_out, block_in};
  with_dtype(param, [&]<typename T>(const ProximalKernels<T>& kernel) {
    const AdamWStep<T> step = {
        .param = data<T>(param),
        .grad = data<const T>(slope),
        .mean = data<T>(exp_avg),
        .square = data<T>(exp_avg_sq),
        .keep = Sum<T>(1 - lr * weight_decay),
        .rate = Sum<T>(lr / (1 - std::pow(beta1, double(number)))),
        .mean_share = Sum<T>(1 - beta1),
        .square_keep = Sum<T>(beta2),
        .square_share = Sum<T>(1 - beta2),
        .root = Sum<T>(std::sqrt(1 - std::pow(beta2, double(number)))),
        .eps = Sum<T>(eps),
    };
    run<T>(step, settings.map<T>(param), kernel.adamw);
  });
}

}  // namespace
}  // namespace compsparse

STABLE_TORCH_LIBRARY_IMPL(compsparse, CPU, m) {
  m.impl("proximal_sgd_", TORCH_BOX(&compsparse::proximal_sgd_));
  m.impl("proximal_adamw_", TORCH_BOX(&compsparse::proximal_adamw_));
}
