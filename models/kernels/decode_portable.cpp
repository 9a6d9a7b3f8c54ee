// The kernels of a decoding step on any processor: GCC's vectors of eight floats, which are AVX2's registers on x86-64 and two of NEON's
// on Arm. All inputs and sums are float32; a bfloat16 weight is widened as it is read.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "decode.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions alone

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx2,fma")))
#else
#define TARGET
#endif
#define TARGET_INLINE TARGET __attribute__((always_inline)) inline

using bf16 = uint16_t;

namespace decode {

namespace {

constexpr int64_t LANES = 8, KEYS = 8, PREFETCH_BYTES = 4096;
constexpr int SUMS = 8, REGISTERS = 16;
typedef float V __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Whole32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
struct Whole {};
struct First {
  int64_t n;
};

template <class T>
using Input = float;

TARGET_INLINE int64_t bytes(Whole) { return LANES; }
TARGET_INLINE int64_t bytes(First lanes) { return lanes.n; }
template <class Lanes>
TARGET_INLINE V load(const float* at, Lanes lanes) {
  V x = {};
  std::memcpy(&x, at, sizeof(float) * bytes(lanes));
  return x;
}
template <class Lanes>
TARGET_INLINE V load(const bf16* at, Lanes lanes) {
  Halves x = {};
  std::memcpy(&x, at, sizeof(bf16) * bytes(lanes));
  return (V)(__builtin_convertvector(x, Bits) << 16);
}
template <class Lanes>
TARGET_INLINE void store(float* at, V x, Lanes lanes) {
  std::memcpy(at, &x, sizeof(float) * bytes(lanes));
}
template <class Lanes>
TARGET_INLINE void store(bf16* at, V x, Lanes lanes) {
  const Bits bits = (Bits)x, even = bits + 0x7fff + (bits >> 16 & 1);      // to the nearest, ties to even
  const Halves halves = __builtin_convertvector((x == x ? even : bits | 0x400000) >> 16, Halves);  // NaN stays NaN
  std::memcpy(at, &halves, sizeof(bf16) * bytes(lanes));
}
TARGET_INLINE V set(float x) { return V{} + x; }
TARGET_INLINE V add(V a, V b) { return a + b; }
TARGET_INLINE V sub(V a, V b) { return a - b; }
TARGET_INLINE V mul(V a, V b) { return a * b; }
TARGET_INLINE V div(V a, V b) { return a / b; }
#if defined(__x86_64__)
TARGET_INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
TARGET_INLINE V fma(V a, V b, V c) { return a * b + c; }
#endif
TARGET_INLINE V max_or_nan(V least, V x) { return x < least ? least : x; }
TARGET_INLINE V nearest(V x) {
  const V shift = set(12582912.0f);  // 1.5 * 2^23: its last bit is worth one
  return (x + shift) - shift;
}
TARGET_INLINE V power_of_two(V whole) { return (V)((__builtin_convertvector(whole, Whole32) + 127) << 23); }
TARGET_INLINE V negative_abs(V x) { return (V)((Bits)x | 0x80000000u); }
TARGET_INLINE V where_negative(V x, V then, V otherwise) { return x < V{} ? then : otherwise; }
TARGET_INLINE float first(V x) { return x[0]; }
TARGET_INLINE float sum(V x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }
template <int N>
TARGET_INLINE void sums(const V (&x)[N], float* to) {
  for (int i = 0; i < N; ++i) to[i] = sum(x[i]);
}
TARGET_INLINE float largest_of(V x) {
  float found = x[0];
  for (int i = 1; i < LANES; ++i) found = found < x[i] ? x[i] : found;
  return found;
}

// Dot products of a query with eight keys.
template <class T>
TARGET_INLINE void dots(const float* query, const T* const (&keys)[KEYS], int64_t dim, float* found);

}  // namespace
}  // namespace decode

#include "decode_kernels.h"

namespace decode {

namespace {

template <class T>
TARGET_INLINE void dots(const float* query, const T* const (&keys)[KEYS], int64_t dim, float* found) {
  V s[KEYS] = {};
  for_each_register(dim, [&](int64_t i, auto lanes) TARGET_LAMBDA {
    const V q = load(query + i, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) s[j] = fma(q, load(keys[j] + i, lanes), s[j]);
  });
  for (int j = 0; j < KEYS; ++j) found[j] = sum(s[j]);
}

}  // namespace

const Kernels* portable_kernels(bool for_bf16) {
  static constexpr Kernels BF16 = kernels<bf16>(dense_product<bf16>), FLOAT = kernels<float>(dense_product<float>);
  return for_bf16 ? &BF16 : &FLOAT;
}

}  // namespace decode
