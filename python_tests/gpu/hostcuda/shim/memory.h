// Shared memory of a block. It begins as NaN in every float type and -1 in integers, as nothing is there on a GPU; its
// size is exact, so that AddressSanitizer sees the first byte beyond.
#pragma once

#include <cstdlib>
#include <cstring>
#include <map>
#include <new>

#include "sanitizers.h"

namespace cs {

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() {
    for (const auto& [tag, memory] : arrays_) free(memory);
  }

  // The array that belongs to a declaration, known by the address of its tag.
  void* array(const void* tag, size_t bytes) {
    void*& memory = arrays_[tag];
    if (memory == nullptr) memory = poisoned(bytes);
    return memory;
  }

 private:
  static void* poisoned(size_t bytes) {
    constexpr size_t alignment = 128;
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
    memset(memory, 0xff, bytes);
    return memory;
  }

  std::map<const void*, void*> arrays_;
};

}  // namespace cs
