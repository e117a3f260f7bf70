// Memory that is written once and grows as it is written.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace compsparse {

constexpr size_t kLargePage = size_t(2) << 20;

// Asks for large pages, where the system has them, for memory not yet touched: to fetch small ones costs more than to
// write them. The system clears a large page as a whole, so not for a part of one.
inline void prefer_large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  if (bytes < kLargePage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Memory that grows, a piece after the other, and is given back as a whole. Null where there is no more.
class Arena {
 public:
  void* allocate(size_t bytes) noexcept {
    bytes = std::max<size_t>((bytes + 63) / 64 * 64, 64);
    if (bytes > left_) {
      const size_t size = std::max(bytes, chunk_);
      const std::align_val_t alignment{size < kLargePage ? 64 : kLargePage};
      auto* memory = static_cast<unsigned char*>(::operator new(size, alignment, std::nothrow));
      if (!memory) return nullptr;
      chunks_.push_back({memory, Free{alignment}});
      prefer_large_pages(memory, size);
      next_ = memory;
      left_ = size;
      chunk_ = std::min(2 * chunk_, largest_chunk);
    }
    void* piece = next_;
    next_ += bytes;
    left_ -= bytes;
    return piece;
  }

 private:
  static constexpr size_t largest_chunk = size_t(8) << 20;
  struct Free {
    std::align_val_t alignment;
    void operator()(unsigned char* memory) const { ::operator delete(memory, alignment); }
  };

  size_t chunk_ = size_t(256) << 10;  // of the next one: a small call fetches little
  std::vector<std::unique_ptr<unsigned char, Free>> chunks_;
  unsigned char* next_ = nullptr;
  size_t left_ = 0;
};

}  // namespace compsparse
