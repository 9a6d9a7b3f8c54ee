// The kernels of a decoding step on AVX-512 with BF16: bfloat16 products by vdpbf16ps, float32 ones by fused multiply-adds.

#include "decode.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemv_avx512.h"
#include "int8.h"

#define TARGET AVX512
#define TARGET_INLINE AVX512_INLINE

namespace decode {

namespace {

using V = __m512;
constexpr int64_t LANES = 16, KEYS = 8, PREFETCH_BYTES = 4096;
constexpr int SUMS = 16, REGISTERS = 32;
struct Whole {};
struct First {
  int64_t n;
};

template <class T>
using Input = T;

AVX512_INLINE __mmask16 mask(Whole) { return ALL_LANES; }
AVX512_INLINE __mmask16 mask(First lanes) { return __mmask16((1u << lanes.n) - 1); }
template <class Lanes>
AVX512_INLINE V load(const float* at, Lanes lanes) {
  return _mm512_maskz_loadu_ps(mask(lanes), at);
}
template <class Lanes>
AVX512_INLINE V load(const bf16* at, Lanes lanes) {
  return load_floats(at, mask(lanes));
}
template <class Lanes>
AVX512_INLINE void store(float* at, V x, Lanes lanes) {
  _mm512_mask_storeu_ps(at, mask(lanes), x);
}
template <class Lanes>
AVX512_INLINE void store(bf16* at, V x, Lanes lanes) {
  store_floats(at, x, mask(lanes));
}
AVX512_INLINE V set(float x) { return _mm512_set1_ps(x); }
AVX512_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
AVX512_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
AVX512_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
AVX512_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
AVX512_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
AVX512_INLINE V max_or_nan(V least, V x) { return _mm512_max_ps(least, x); }
AVX512_INLINE V nearest(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
AVX512_INLINE V power_of_two(V whole) { return _mm512_scalef_ps(set(1.0f), whole); }
AVX512_INLINE V negative_abs(V x) { return sub(set(0.0f), _mm512_abs_ps(x)); }
AVX512_INLINE V where_negative(V x, V then, V otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, set(0.0f), _CMP_LT_OQ), otherwise, then);
}
AVX512_INLINE float sum(V x) { return sum_of_lanes(x); }
template <int N>
AVX512_INLINE void sums(const V (&x)[N], float* to) {
  sums_of_lanes(x, to);
}
AVX512_INLINE float largest_of(V x) { return _mm512_reduce_max_ps(x); }
AVX512_INLINE float first(V x) { return _mm512_cvtss_f32(x); }

AVX512_INLINE void add_dots(const bf16* query, const bf16* const (&keys)[KEYS], int64_t i, __mmask32 lanes, V (&s)[KEYS]) {
  const __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(lanes, query + i);
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j) s[j] = _mm512_dpbf16_ps(s[j], q, (__m512bh)_mm512_maskz_loadu_epi16(lanes, keys[j] + i));
}

AVX512_INLINE void add_dots(const float* query, const float* const (&keys)[KEYS], int64_t i, __mmask32 lanes, V (&s)[KEYS]) {
  for (int half = 0; half < 2; ++half, i += LANES, lanes >>= LANES) {
    const V q = _mm512_maskz_loadu_ps(__mmask16(lanes), query + i);
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) s[j] = fma(q, _mm512_maskz_loadu_ps(__mmask16(lanes), keys[j] + i), s[j]);
  }
}

// Eight dot products of a query with keys, which share their last additions.
template <class T>
AVX512_INLINE void dots(const T* query, const T* const (&keys)[KEYS], int64_t dim, float* found) {
  V s[KEYS];
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j) s[j] = set(0.0f);
  int64_t i = 0;
  for (; i + BF16_LANES <= dim; i += BF16_LANES) add_dots(query, keys, i, ~0u, s);
  if (i < dim) add_dots(query, keys, i, lane_mask(dim - i), s);
  _mm256_storeu_ps(found, sums_of_lanes(s));
}

}  // namespace
}  // namespace decode

#include "decode_kernels.h"

namespace decode {

namespace {

template <class T>
void int8_product(const Matrix& m, const Inputs& inputs, int64_t rows, int64_t first, int64_t last, float* y, int64_t stride) {
  static thread_local int8::Rounded x;
  static thread_local int64_t rounded = -1;
  const int8::Weight& w = *static_cast<const int8::Weight*>(m.weight);
  if (rounded != inputs.number) x.round(static_cast<const T*>(inputs.at), rows, m.inputs, w.outlier);
  rounded = inputs.number;
  int8::outputs(w, x, static_cast<const T*>(m.bias), first, last, y, stride);
}

void float_product(const Matrix& m, const Inputs& inputs, int64_t rows, int64_t first, int64_t last, float* y, int64_t stride) {
  (m.format == INT8 ? int8_product<float> : dense_product<float>)(m, inputs, rows, first, last, y, stride);
}

void bf16_product(const Matrix& m, const Inputs& inputs, int64_t rows, int64_t first, int64_t last, float* y, int64_t stride) {
  if (m.format == INT8) return int8_product<bf16>(m, inputs, rows, first, last, y, stride);
  static thread_local Buffer own;
  uint8_t* const scratch = reinterpret_cast<uint8_t*>(own.reserve(decoded_bytes(MAX_OUTPUTS * m.inputs)));
  const ProductTo<float> p{static_cast<const bf16*>(inputs.at), static_cast<const bf16*>(m.bias), y - first, rows, m.inputs, stride};
  if (m.format == NF4) outputs(*static_cast<const Nf4*>(m.weight), p, first, last, scratch);
  else if (m.format == PACKED) outputs(*static_cast<const Packed*>(m.weight), p, first, last, scratch);
  else outputs(Dense{static_cast<const bf16*>(m.weight), m.inputs}, p, first, last, scratch);
}

}  // namespace

const Kernels* avx512_kernels(bool for_bf16) {
  static constexpr Kernels BF16 = kernels<bf16>(bf16_product), FLOAT = kernels<float>(float_product);
  return for_bf16 ? &BF16 : &FLOAT;
}

}  // namespace decode

#else

const decode::Kernels* decode::avx512_kernels(bool) { return nullptr; }

#endif
