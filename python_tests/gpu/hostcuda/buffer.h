// Memory of exact size that begins as NaN, aligned as CUDA's allocators do.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

struct Free {
  void operator()(void* memory) const { free(memory); }
};

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size) {
    constexpr size_t alignment = 256;
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, size * sizeof(T)) != 0) throw std::bad_alloc();
    memset(memory, 0xff, size * sizeof(T));
    memory_.reset(static_cast<T*>(memory));
  }
  T* data() const { return memory_.get(); }
  T& operator[](int64_t i) const { return memory_.get()[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[], Free> memory_;
};
