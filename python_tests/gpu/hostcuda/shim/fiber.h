// Fibers: stacks with guard pages, and the switch between them.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>

#include "sanitizers.h"

#ifndef __x86_64__
#error "the fibers of the CUDA shim switch stacks in x86-64 assembly"
#endif

// Saves the registers that a call preserves and the stack pointer, and takes up another stack where it was left.
extern "C" void cs_switch(void** saved_stack_pointer, void* stack_pointer);
asm(R"(
    .text
    .weak cs_switch
    .type cs_switch, @function
cs_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
    .size cs_switch, .-cs_switch
)");

namespace cs {

struct Stack {
  void* pointer = nullptr;  // while it does not run
  CheckedStack checked;
};

CS_UNCHECKED inline void switch_stacks(Stack& from, Stack& to, bool ends = false) {
  leave(from.checked, to.checked, ends);
  cs_switch(&from.pointer, to.pointer);
  arrive(from.checked, to.checked);
}

// Stacks in one mapping, each above a page that nobody may touch.
class StackPool {
 public:
  explicit StackPool(size_t count) : size_(count * (Page + Size)) {
    memory_ = map(nullptr, size_, 0);
    for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * (Page + Size), Page, PROT_NONE);
  }
  StackPool(const StackPool&) = delete;
  ~StackPool() { munmap(memory_, size_); }

  // Makes stack i call `entry`, which must not return.
  void start(size_t i, Stack& stack, void (*entry)()) const {
    char* const bottom = memory_ + i * (Page + Size) + Page;
#ifdef __SANITIZE_THREAD__
    map(bottom, Size, MAP_FIXED);  // TSan forgets who used the memory before
#endif
    stack.checked.bottom = bottom;
    stack.checked.size = Size;
    void** top = reinterpret_cast<void**>(bottom + Size);
    *--top = nullptr;  // where the return address of `entry` would be: the alignment that a call leaves
    *--top = reinterpret_cast<void*>(entry);
    constexpr int saved_registers = 6;
    for (int i = 0; i < saved_registers; ++i) *--top = nullptr;
    stack.pointer = top;
  }

 private:
  static constexpr size_t Page = 4096;
  static constexpr size_t Size = 64 * 1024;

  static char* map(void* where, size_t size, int flags) {
    flags |= MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const memory = mmap(where, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a CUDA block");
    return static_cast<char*>(memory);
  }

  size_t size_;
  char* memory_;
};

}  // namespace cs
