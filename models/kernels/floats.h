// bfloat16 to float32 and back, one value or sixteen at a time.
// Only functions marked AVX512 use its instructions, so the library loads on any x86-64 and says there whether it is supported.

#pragma once

#include <cstdint>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")))
#define AVX512_INLINE AVX512 __attribute__((always_inline)) inline

using bf16 = uint16_t;

constexpr int64_t FLOAT_LANES = 16;  // in a register
constexpr __mmask16 ALL_LANES = 0xffff;

AVX512_INLINE float to_float(float value) { return value; }

AVX512_INLINE float to_float(bf16 value) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(uint32_t(value) << 16))); }

AVX512_INLINE bf16 to_bf16(float value) { return bf16(_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)))); }

AVX512_INLINE __m512 load_floats(const bf16* at, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, at)), 16));
}

AVX512_INLINE void store_floats(bf16* at, __m512 values, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(at, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

AVX512_INLINE __m512 load_floats(const float* at, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, at); }

AVX512_INLINE void store_floats(float* at, __m512 values, __mmask16 lanes) { _mm512_mask_storeu_ps(at, lanes, values); }

// Mask of a register when `left` values remain.
AVX512_INLINE __mmask16 lanes_of(int64_t left) {
  return left >= FLOAT_LANES ? ALL_LANES : left > 0 ? __mmask16((1u << left) - 1) : __mmask16(0);
}

// e^x for x <= 0, NaN for NaN; relative error 2e-6. 2^n times the Taylor polynomial of the remainder.
AVX512_INLINE __m512 exp_nonpositive(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-87.0f), x), _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT);
  const __m512 t = _mm512_mul_ps(_mm512_sub_ps(scaled, whole), _mm512_set1_ps(0.69314718f));
  __m512 sum = _mm512_set1_ps(1.0f / 120);
  for (const float next : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(next));
  return _mm512_scalef_ps(sum, whole);
}

// Sums of the lanes of eight registers, which share their last additions.
AVX512_INLINE __m256 sums_of_lanes(const __m512 (&x)[8]) {
  __m512 s[8];
#pragma GCC unroll 4
  for (int j = 0; j < 8; j += 2) s[j] = _mm512_add_ps(_mm512_unpacklo_ps(x[j], x[j + 1]), _mm512_unpackhi_ps(x[j], x[j + 1]));
#pragma GCC unroll 2
  for (int j = 0; j < 8; j += 4) {
    const __m512d even = _mm512_castps_pd(s[j]), odd = _mm512_castps_pd(s[j + 2]);
    s[j] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  const __m512 half = _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[4], 0x88), _mm512_shuffle_f32x4(s[0], s[4], 0xdd));
  const __m256 low = _mm512_castps512_ps256(half), high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(half), 1));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// The same for one, bit for bit.
AVX512_INLINE float sum_of_lanes(__m512 x) {
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
  x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  return _mm512_cvtss_f32(_mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e)));
}

// Sums of the lanes of N registers.
template <int N>
AVX512_INLINE void sums_of_lanes(const __m512 (&x)[N], float* to) {
  int i = 0;
#pragma GCC unroll 4
  for (; i + 4 < N; i += 8) {
    __m512 some[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) some[j] = i + j < N ? x[i + j] : _mm512_setzero_ps();
    _mm256_mask_storeu_ps(to + i, N - i < 8 ? (1 << (N - i)) - 1 : 0xff, sums_of_lanes(some));
  }
#pragma GCC unroll 4
  for (; i < N; ++i) to[i] = sum_of_lanes(x[i]);
}
