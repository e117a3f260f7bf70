// Memory for packed operands.
#pragma once

#include <stdint.h>

#include <new>

namespace compsparse {

// Uninitialised, at a cache-line boundary: a vector load across two lines costs as much as two.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kLine))) {}
  ~Scratch() { ::operator delete(data_, kLine); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* data_;
};

}  // namespace compsparse
