// What AddressSanitizer and ThreadSanitizer must be told about fibers. Without them every function here is empty.
//
// TSan sees each CUDA thread as a thread of its own, ordered with the others by nothing but the barriers and
// collectives, which say so through release() and acquire(). The shim's own bookkeeping is not under test: it runs
// Quiet.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_ignore_thread_begin(void);
void __tsan_ignore_thread_end(void);
}
#endif

// For functions that switch stacks, or run between two switches.
#define CS_UNCHECKED __attribute__((no_sanitize("thread"), no_sanitize("address")))

namespace cs {

// A stack, and what the sanitizers keep about whoever runs on it.
struct CheckedStack {
  const void* bottom = nullptr;
  size_t size = 0;
  void* asan_frames = nullptr;
  void* tsan_fiber = nullptr;
};

CS_UNCHECKED inline void release([[maybe_unused]] void* tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(tag);
#endif
}

CS_UNCHECKED inline void acquire([[maybe_unused]] void* tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(tag);
#endif
}

struct Quiet {
#ifdef __SANITIZE_THREAD__
  CS_UNCHECKED Quiet() { __tsan_ignore_thread_begin(); }
  CS_UNCHECKED ~Quiet() { __tsan_ignore_thread_end(); }
#else
  Quiet() {}
  ~Quiet() {}
#endif
};

inline void adopt_running_thread([[maybe_unused]] CheckedStack& stack) {
#ifdef __SANITIZE_THREAD__
  stack.tsan_fiber = __tsan_get_current_fiber();
#endif
}

inline void create_fiber([[maybe_unused]] CheckedStack& stack) {
#ifdef __SANITIZE_THREAD__
  stack.tsan_fiber = __tsan_create_fiber(0);
#endif
}

inline void destroy_fiber([[maybe_unused]] CheckedStack& stack) {
#ifdef __SANITIZE_THREAD__
  __tsan_destroy_fiber(stack.tsan_fiber);
#endif
}

// Before a switch. A fiber that ends does not come back for its frames.
CS_UNCHECKED inline void leave([[maybe_unused]] CheckedStack& from, [[maybe_unused]] const CheckedStack& to,
                               [[maybe_unused]] bool ends) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.asan_frames, to.bottom, to.size);
#endif
#ifdef __SANITIZE_THREAD__
  constexpr unsigned without_synchronisation = 1;
  __tsan_switch_to_fiber(to.tsan_fiber, without_synchronisation);
#endif
}

// After a switch: `me` runs, `from` ran before.
CS_UNCHECKED inline void arrive([[maybe_unused]] CheckedStack& me, [[maybe_unused]] CheckedStack& from) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(me.asan_frames, &from.bottom, &from.size);
#endif
}

}  // namespace cs
