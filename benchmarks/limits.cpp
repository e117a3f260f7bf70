// What one core can do, for benchmarks.profile: products a second from registers, and bytes a second from wherever a
// buffer of a given size lies. Compiled when it is asked for, with the flags of the instruction set.
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define VECTOR_REGISTER "+x"
#else
#define VECTOR_REGISTER "+w"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * lanes), aligned(4)));

// Keeps the compiler from knowing what a register holds.
inline void hide(Vec& v) { __asm__ volatile("" : VECTOR_REGISTER(v)); }

template <class Step>
double products(int64_t steps, const Step& step) {
  constexpr int chains = 12;  // more than latency times throughput
  Vec a = Vec{} + 0.5f, sum[chains];
  hide(a);
  for (int c = 0; c < chains; ++c) sum[c] = Vec{} + (float)c;  // equal ones would be one
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < chains; ++c) sum[c] = step(a, sum[c]);
  for (int c = 1; c < chains; ++c) sum[0] += sum[c];
  return sum[0][0];
}

}  // namespace

// Multiply-adds that `steps` steps do.
extern "C" int64_t float32_products(int64_t steps) {
  volatile double unused = products(steps, [](Vec a, Vec sum) { return sum * a + a; });
  (void)unused;
  return steps * 12 * lanes;
}

extern "C" int64_t bfloat16_products(int64_t steps) {
#if defined(__AVX512BF16__)
  volatile double unused =
      products(steps, [](Vec a, Vec sum) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)a); });
  (void)unused;
  return 2 * steps * 12 * lanes;
#else
  return float32_products(steps);
#endif
}

// Bytes read: all of the buffer, `times` times.
extern "C" int64_t read_bytes(const float* buffer, int64_t count, int64_t times) {
  Vec sum[4] = {};
  for (int64_t t = 0; t < times; ++t)
    for (int64_t i = 0; i + 4 * lanes <= count; i += 4 * lanes)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[c] += *(const Vec*)(buffer + i + c * lanes);
  volatile double unused = (sum[0] + sum[1] + sum[2] + sum[3])[0];
  (void)unused;
  return times * (count / (4 * lanes)) * 16 * lanes;
}
