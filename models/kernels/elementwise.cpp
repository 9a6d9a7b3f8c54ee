// What happens to rows between products, each in one pass with one rounding: norm, gate and rotation.
//
// torch makes several passes of each, with a tensor between any two: of a prompt of 168 rows at 1.1B geometry they took a tenth, of
// a decoding step a twelfth.

#include <cstdint>

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>

#include "floats.h"

namespace {

constexpr int64_t SERIAL = 32 << 10;  // values below which waking other threads costs more than they save

int crew(int64_t values, int threads) { return values < SERIAL ? 1 : threads; }

// Calls body(i, lanes) for every sixteen of `width` values; the last may be fewer.
template <class Body>
WIDE_INLINE void each(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + FLOATS <= width; i += FLOATS) body(i, WHOLE);
  if (i < width) body(i, __mmask16((1u << (width - i)) - 1));
}

WIDE void rms_norm_row(const bf16* x, const bf16* weight, bf16* y, int64_t width, float eps) {
  __m512 squares = _mm512_setzero_ps();
  each(width, [&](int64_t i, __mmask16 lanes) WIDE __attribute__((always_inline)) {
    const __m512 value = widen_all(x + i, lanes);
    squares = _mm512_fmadd_ps(value, value, squares);
  });
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
  each(width, [&](int64_t i, __mmask16 lanes) WIDE __attribute__((always_inline)) {
    narrow_all(y + i, _mm512_mul_ps(_mm512_mul_ps(widen_all(x + i, lanes), scale), widen_all(weight + i, lanes)), lanes);
  });
}

WIDE_INLINE __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __m512 upper = _mm512_div_ps(one, _mm512_add_ps(one, e));
  return _mm512_mask_mul_ps(upper, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), upper, e);
}

WIDE void swish_row(const bf16* x, const bf16* up, bf16* y, int64_t width, float slope) {
  each(width, [&](int64_t i, __mmask16 lanes) WIDE __attribute__((always_inline)) {
    const __m512 value = widen_all(x + i, lanes);
    const __m512 gated = _mm512_mul_ps(value, sigmoid(_mm512_mul_ps(value, _mm512_set1_ps(slope))));
    narrow_all(y + i, up ? _mm512_mul_ps(gated, widen_all(up + i, lanes)) : gated, lanes);
  });
}

WIDE void apply_rope_row(const bf16* x, const bf16* cos, const bf16* sin, bf16* y, int64_t heads, int64_t half) {
  for (int64_t head = 0; head < heads; ++head, x += 2 * half, y += 2 * half)
    each(half, [&](int64_t i, __mmask16 lanes) WIDE __attribute__((always_inline)) {
      const __m512 first = widen_all(x + i, lanes), second = widen_all(x + half + i, lanes);
      const __m512 c = widen_all(cos + i, lanes), s = widen_all(sin + i, lanes);
      narrow_all(y + i, _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s)), lanes);
      narrow_all(y + half + i, _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s)), lanes);
    });
}

}  // namespace

extern "C" {

// Root mean square norm of x [rows, width], times weight [width].
void rms_norm(const bf16* x, const bf16* weight, bf16* y, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(crew(rows * width, threads))
  for (int64_t r = 0; r < rows; ++r) rms_norm_row(x + r * width, weight, y + r * width, width, eps);
}

// x sigmoid(slope x), times up where that is not null: x and up [rows, width] with rows `apart` values apart, y without gaps.
void swish(const bf16* x, const bf16* up, bf16* y, int64_t rows, int64_t width, int64_t apart, float slope, int threads) {
#pragma omp parallel for num_threads(crew(rows * width, threads))
  for (int64_t r = 0; r < rows; ++r) swish_row(x + r * apart, up ? up + r * apart : nullptr, y + r * width, width, slope);
}

// Rotary position embedding of x [rows, heads, 2 half], rows `apart` values apart, by cos and sin [rows, half]: y without gaps.
void apply_rope(const bf16* x, const bf16* cos, const bf16* sin, bf16* y, int64_t rows, int64_t heads, int64_t half, int64_t apart,
            int threads) {
#pragma omp parallel for num_threads(crew(rows * heads * half * 2, threads))
  for (int64_t r = 0; r < rows; ++r) apply_rope_row(x + r * apart, cos + r * half, sin + r * half, y + r * heads * 2 * half, heads, half);
}
}

#endif
