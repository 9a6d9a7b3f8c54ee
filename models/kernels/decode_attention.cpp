// Decode attention: one new row of each request over its keys and values, in bfloat16 with float32 sums.
//
// One call a layer; the heads of a request that share keys are one task. torch takes several calls a request, each of which wakes
// threads for microseconds of work: half of a decoding step at 16 requests of 200 rows.

#include <cstdint>

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>
#include <vector>

#include "floats.h"

// One request's keys and values in a layer, as __init__.py lays them out: six 64-bit words.
struct RequestKV {
  const bf16* keys;    // [kv_heads, length, dim], rows without gaps
  const bf16* values;  // the same
  const bf16* bias;    // [length], added to the scores, or null
  int64_t length;
  int64_t key_stride;  // from one head to the next
  int64_t value_stride;
};

namespace {

// Eight dot products that share their last additions: of G queries and 8 / G keys, [key, query].
template <int G>
AVX512_INLINE __m256 dots(const bf16* query, const bf16* const (&keys)[8 / G], int64_t dim) {
  __m512 s[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) s[j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < dim; i += 2 * FLOAT_LANES)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      s[j] = _mm512_dpbf16_ps(s[j], (__m512bh)_mm512_loadu_si512(query + j % G * dim + i),
                              (__m512bh)_mm512_loadu_si512(keys[j / G] + i));
#pragma GCC unroll 4
  for (int j = 0; j < 8; j += 2) s[j] = _mm512_add_ps(_mm512_unpacklo_ps(s[j], s[j + 1]), _mm512_unpackhi_ps(s[j], s[j + 1]));
#pragma GCC unroll 2
  for (int j = 0; j < 8; j += 4) {
    const __m512d even = _mm512_castps_pd(s[j]), odd = _mm512_castps_pd(s[j + 2]);
    s[j] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  const __m512 half = _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[4], 0x88), _mm512_shuffle_f32x4(s[0], s[4], 0xdd));
  const __m256 low = _mm512_castps512_ps256(half), high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(half), 1));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// Replaces scores [length], padded to whole registers with -inf, by the exponentials of softmax; returns their sum.
AVX512_INLINE float exponentiate(float* scores, int64_t length) {
  __m512 largest = _mm512_loadu_ps(scores), sum = _mm512_setzero_ps();
  for (int64_t t = 0; t < length; t += FLOAT_LANES) largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + t));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  for (int64_t t = 0; t < length; t += FLOAT_LANES) {
    const __m512 x = _mm512_loadu_ps(scores + t);
    const __mmask16 there = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    const __m512 e = _mm512_maskz_mov_ps(there, exp_nonpositive(_mm512_sub_ps(x, top)));
    sum = _mm512_add_ps(sum, e);
    _mm512_storeu_ps(scores + t, e);
  }
  return _mm512_reduce_add_ps(sum);
}

// Weighted sums of D registers of each row of values, for G queries.
template <int G, int D>
AVX512_INLINE void weighted_sum(const bf16* values, const float* scores, int64_t length, int64_t padded, int64_t dim,
                                const __m512 (&inverse_sum)[G], bf16* out) {
  __m512 sums[G][D];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) sums[g][d] = _mm512_setzero_ps();
  for (int64_t t = 0; t < length; ++t) {
    __m512 row[D];
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) row[d] = load_floats(values + t * dim + d * FLOAT_LANES, ALL_LANES);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) sums[g][d] = _mm512_fmadd_ps(_mm512_set1_ps(scores[g * padded + t]), row[d], sums[g][d]);
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) store_floats(out + g * dim + d * FLOAT_LANES, _mm512_mul_ps(sums[g][d], inverse_sum[g]), ALL_LANES);
}

// Attention of G queries that share a head's keys and values; `scores` has room for [G, padded length].
template <int G>
AVX512 void attend(const RequestKV& kv, const bf16* keys, const bf16* values, const bf16* query, int64_t dim, float scale,
                   float* scores, bf16* out) {
  constexpr int T = 8 / G;
  const int64_t length = kv.length, padded = (length + FLOAT_LANES - 1) / FLOAT_LANES * FLOAT_LANES;
  for (int64_t t = 0; t < length; t += T) {
    const bf16* some[T];
    for (int i = 0; i < T; ++i) some[i] = keys + std::min(t + i, length - 1) * dim;
    alignas(32) float found[8];
    _mm256_store_ps(found, dots<G>(query, some, dim));
    for (int i = 0; i < std::min<int64_t>(T, length - t); ++i) {
      const float bias = kv.bias ? to_float(kv.bias[t + i]) : 0.0f;
      for (int g = 0; g < G; ++g) scores[g * padded + t + i] = scale * found[i * G + g] + bias;
    }
  }
  __m512 inverse_sum[G];
  for (int g = 0; g < G; ++g) {
    std::fill(scores + g * padded + length, scores + (g + 1) * padded, -INFINITY);
    inverse_sum[g] = _mm512_set1_ps(1.0f / exponentiate(scores + g * padded, length));
  }
  constexpr int MOST = G == 1 ? 8 : 16 / G;  // registers of values at once: the sums of all queries then take 8 or 16
  int64_t i = 0;
  for (; i + MOST * FLOAT_LANES <= dim; i += MOST * FLOAT_LANES)
    weighted_sum<G, MOST>(values + i, scores, length, padded, dim, inverse_sum, out + i);
  for (; i < dim; i += 2 * FLOAT_LANES) weighted_sum<G, 2>(values + i, scores, length, padded, dim, inverse_sum, out + i);
}

using Attend = void (*)(const RequestKV&, const bf16*, const bf16*, const bf16*, int64_t, float, float*, bf16*);

// Queries of a group that are computed together: 8, 4, 2 or 1.
int queries_at_once(int64_t group) { return group % 8 == 0 ? 8 : group % 4 == 0 ? 4 : group % 2 == 0 ? 2 : 1; }

}  // namespace

// query and out [requests, heads, dim], queries query_stride values apart; dim is a multiple of 32.
extern "C" void decode_attention(const bf16* query, int64_t query_stride, const RequestKV* kv, bf16* out, int64_t requests,
                                 int64_t heads, int64_t kv_heads, int64_t dim, float scale, int threads) {
  const int64_t group = heads / kv_heads;
  const int some = queries_at_once(group);
  const Attend attend_some = some == 8 ? attend<8> : some == 4 ? attend<4> : some == 2 ? attend<2> : attend<1>;
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> scratch;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t r = 0; r < requests; ++r)
      for (int64_t h = 0; h < kv_heads; ++h) {
        const RequestKV& own = kv[r];
        scratch.resize(std::max<size_t>(scratch.size(), some * (own.length + FLOAT_LANES)));
        for (int64_t at = h * group * dim; at < (h + 1) * group * dim; at += some * dim)
          attend_some(own, own.keys + h * own.key_stride, own.values + h * own.value_stride, query + r * query_stride + at, dim, scale,
                      scratch.data(), out + r * heads * dim + at);
      }
  }
}

#endif
