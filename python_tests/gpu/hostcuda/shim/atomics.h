// Atomic functions, lock-free on the host, so that ThreadSanitizer knows them for atomic. They order nothing else, as
// on a GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace cs {

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// *address = change(*address), and the value before.
template <class T, class Change>
T read_modify_write(T* address, const Change& change) {
  using Bits = BitsOf<T>;
  static_assert(sizeof(T) == sizeof(Bits));
  Bits* const target = reinterpret_cast<Bits*>(address);
  Bits before = __atomic_load_n(target, __ATOMIC_RELAXED), after;
  T value;
  do {
    memcpy(&value, &before, sizeof value);
    const T changed = change(value);
    memcpy(&after, &changed, sizeof after);
  } while (!__atomic_compare_exchange_n(target, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return value;
}

}  // namespace cs

template <class T>
T atomicAdd(T* address, T value) {
  return cs::read_modify_write(address, [=](T old) { return T(old + value); });
}

template <class T>
T atomicMax(T* address, T value) {
  return cs::read_modify_write(address, [=](T old) { return old > value ? old : value; });
}

template <class T>
T atomicMin(T* address, T value) {
  return cs::read_modify_write(address, [=](T old) { return old < value ? old : value; });
}

template <class T>
T atomicCAS(T* address, T expected, T value) {
  return cs::read_modify_write(address, [=](T old) { return old == expected ? value : old; });
}
