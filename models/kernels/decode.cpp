// Attention of one new row of each request over its keys and values, in bfloat16 with float32 sums.
//
// torch takes several calls a request for this, each of which wakes threads for microseconds of work: at 16 requests of 200 rows
// they took half of a decoding step. Here a layer is one call; a request's heads that share keys are one piece of work.

#include <cstdint>

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <vector>

#include "floats.h"

// One request's rows in a layer; the wrapper lays these out as six 64-bit words.
struct Seen {
  const bf16* keys;    // [kv_heads, length, dim], rows without gaps
  const bf16* values;  // the same
  const bf16* bias;    // [length], added to the scores, or null
  int64_t length;
  int64_t key_heads;   // values from one head's keys to the next one's
  int64_t value_heads;
};

namespace {

WIDE_INLINE float dot(const bf16* a, const bf16* b, int64_t dim) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < dim; i += 2 * FLOATS)
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
  return _mm512_reduce_add_ps(sum);
}

// Scores [length], padded to whole registers with minus infinity, to their exponentials; returns what these add up to.
WIDE_INLINE float exponentials(float* scores, int64_t length) {
  __m512 most = _mm512_loadu_ps(scores), sum = _mm512_setzero_ps();
  for (int64_t t = 0; t < length; t += FLOATS) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + t));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t t = 0; t < length; t += FLOATS) {
    const __m512 x = _mm512_loadu_ps(scores + t);
    const __mmask16 there = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    const __m512 e = _mm512_maskz_mov_ps(there, exponential(_mm512_sub_ps(x, top)));
    sum = _mm512_add_ps(sum, e);
    _mm512_storeu_ps(scores + t, e);
  }
  return _mm512_reduce_add_ps(sum);
}

WIDE void attend(const Seen& seen, int64_t head, const bf16* query, int64_t group, int64_t dim, float scale, float* scratch, bf16* out) {
  const bf16* const keys = seen.keys + head * seen.key_heads;
  const bf16* const values = seen.values + head * seen.value_heads;
  const int64_t padded = (seen.length + FLOATS - 1) / FLOATS * FLOATS;
  float* const mixed = scratch + group * padded;
  for (int64_t t = 0; t < seen.length; ++t)
    for (int64_t g = 0; g < group; ++g) {
      const float bias = seen.bias ? widen(seen.bias[t]) : 0.0f;
      scratch[g * padded + t] = scale * dot(query + g * dim, keys + t * dim, dim) + bias;
    }
  for (int64_t g = 0; g < group; ++g) {
    float* const scores = scratch + g * padded;
    std::fill(scores + seen.length, scores + padded, -INFINITY);
    const __m512 share = _mm512_set1_ps(1.0f / exponentials(scores, seen.length));
    std::fill(mixed, mixed + dim, 0.0f);
    for (int64_t t = 0; t < seen.length; ++t)
      for (int64_t i = 0; i < dim; i += FLOATS) {
        const __m512 sum = _mm512_loadu_ps(mixed + i);
        _mm512_storeu_ps(mixed + i, _mm512_fmadd_ps(_mm512_set1_ps(scores[t]), widen_all(values + t * dim + i, WHOLE), sum));
      }
    for (int64_t i = 0; i < dim; i += FLOATS) {
      narrow_all(out + g * dim + i, _mm512_mul_ps(_mm512_loadu_ps(mixed + i), share), WHOLE);
    }
  }
}

}  // namespace

// query [requests, heads, dim], rows `apart` values apart, to out [requests, heads, dim]; dim a multiple of 32.
extern "C" void decode(const bf16* query, int64_t apart, const Seen* seen, bf16* out, int64_t requests, int64_t heads,
                       int64_t kv_heads, int64_t dim, float scale, int threads) {
  const int64_t group = heads / kv_heads;
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> scratch;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t r = 0; r < requests; ++r)
      for (int64_t h = 0; h < kv_heads; ++h) {
        scratch.resize(std::max<size_t>(scratch.size(), group * (seen[r].length + FLOATS) + dim));
        const int64_t at = h * group * dim;
        attend(seen[r], h, query + r * apart + at, group, dim, scale, scratch.data(), out + r * heads * dim + at);
      }
  }
}

#endif
