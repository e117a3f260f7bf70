// Memory for packed operands.
#pragma once

#include <stdint.h>

#include <memory>
#include <new>

namespace compsparse {

constexpr std::align_val_t kCacheLine{64};

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, kCacheLine); }
};

// Uninitialised, at a cache-line boundary: a vector load across two lines costs as much as two.
template <typename T>
using Scratch = std::unique_ptr<T[], FreeAligned>;

template <typename T>
Scratch<T> make_scratch(int64_t size) {
  return Scratch<T>(static_cast<T*>(::operator new(size * sizeof(T), kCacheLine)));
}

}  // namespace compsparse
