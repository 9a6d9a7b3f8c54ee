// Attention of many rows over their keys and values on AVX-512, multiplied in float32: for prompts and pictures on Intel's processors
// without AMX.
//
// - Keys are turned round once for each KV head, so that scores are sums over head dimensions with a key in each lane. Twelve queries
//   and 32 keys are 24 sums, of which a head dimension needs two registers of keys and a value of each query.
// - The scores of twelve queries with all keys stay in an L2 cache, so that a row's exponentials need no correction later.
// - Six queries' weighted sums of 64 dimensions are 24 registers.
//
// A row is summed in the order of its keys, whatever rows are beside it.

#include <cstdint>

#if defined(__x86_64__)

#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace {

constexpr int64_t QUERIES = 12;             // of a block of scores
constexpr int64_t MIXED = 6;                // of a block of weighted sums
constexpr int64_t KEYS = 2 * FLOAT_LANES;   // of a block of scores
constexpr int MIX_REGISTERS = 4;            // of each query's weighted sum
constexpr int64_t PACKED_BYTES = 16 << 20;  // of keys and values in float32 at a time, or those of one KV head: they are kept

// query [rows, heads, dim], `query_stride` values from row to row; keys and values [kv_heads, length, dim], `head_stride` values from head
// to head; bias [length] or null; out [rows, heads, dim].
template <class T>
struct Attention {
  const T* query;
  const T *keys, *values, *bias;
  T* out;
  int64_t query_stride, head_stride, rows, length, heads, kv_heads, dim;
  float scale;
  bool causal;

  int64_t padded() const { return ceil_div(length, KEYS) * KEYS; }
  int64_t wide() const { return ceil_div(dim, FLOAT_LANES) * FLOAT_LANES; }
  int64_t head_floats() const { return padded() * (dim + wide()); }  // of a KV head's keys and values in float32
};

// Sixteen keys of a head from `first` on: to [dim, padded].
template <class T>
AVX512 void turn_keys(const Attention<T>& a, const T* keys, int64_t first, float* to) {
  for (int64_t d = 0; d < a.dim; d += FLOAT_LANES) {
    const __mmask16 lanes = lanes_of(a.dim - d);
    __m512i r[TILE_ROWS];
#pragma GCC unroll 16
    for (int j = 0; j < TILE_ROWS; ++j)
      r[j] = _mm512_castps_si512(load_floats(keys + (first + j) * a.dim + d, first + j < a.length ? lanes : __mmask16(0)));
    transpose(r);
#pragma GCC unroll 16
    for (int j = 0; j < TILE_ROWS; ++j)
      if (d + j < a.dim) _mm512_store_si512(to + (d + j) * a.padded() + first, r[j]);
  }
}

// Sixteen values of a head from `first` on: to [padded, wide], zeros where there are none.
template <class T>
AVX512 void widen_values(const Attention<T>& a, const T* values, int64_t first, float* to) {
  for (int64_t row = first; row < first + FLOAT_LANES; ++row)
    for (int64_t d = 0; d < a.wide(); d += FLOAT_LANES)
      _mm512_store_ps(to + row * a.wide() + d, load_floats(values + row * a.dim + d, row < a.length ? lanes_of(a.dim - d) : __mmask16(0)));
}

// Scores of R queries [dim, QUERIES] with the first `count` keys [dim, padded]: to [QUERIES, padded].
template <int R>
AVX512 void score(const float* queries, const float* keys, int64_t dim, int64_t count, int64_t padded, float* scores) {
  for (int64_t t = 0; t < count; t += KEYS) {
    __m512 sums[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; ++d) {
      const __m512 first = _mm512_load_ps(keys + d * padded + t), second = _mm512_load_ps(keys + d * padded + t + FLOAT_LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512 query = _mm512_set1_ps(queries[d * QUERIES + r]);
        sums[r][0] = _mm512_fmadd_ps(query, first, sums[r][0]);
        sums[r][1] = _mm512_fmadd_ps(query, second, sums[r][1]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      _mm512_store_ps(scores + r * padded + t, sums[r][0]);
      _mm512_store_ps(scores + r * padded + t + FLOAT_LANES, sums[r][1]);
    }
  }
}

// Replaces a row's scores by their exponentials, zeros from `seen` on up to `count`; returns one over their sum.
template <class T>
AVX512 float exponentiate(float* scores, const T* bias, int64_t seen, int64_t count) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY);
  __m512 largest = lowest, all = _mm512_setzero_ps();
  for (int64_t t = 0; t < count; t += FLOAT_LANES) {
    const __mmask16 lanes = lanes_of(seen - t);
    __m512 value = _mm512_load_ps(scores + t);
    if (bias) value = _mm512_add_ps(value, load_floats(bias + t, lanes));
    value = _mm512_mask_mov_ps(lowest, lanes, value);
    _mm512_store_ps(scores + t, value);
    largest = _mm512_max_ps(largest, value);
  }
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  for (int64_t t = 0; t < count; t += FLOAT_LANES) {
    const __m512 e = _mm512_maskz_mov_ps(lanes_of(seen - t), exp_nonpositive(_mm512_sub_ps(_mm512_load_ps(scores + t), top)));
    _mm512_store_ps(scores + t, e);
    all = _mm512_add_ps(all, e);
  }
  return 1 / sum_of_lanes(all);
}

// D registers of the weighted sums of R rows: scores [R, padded] times values [.., wide].
template <int R, int D, class T>
AVX512 void mix(const Attention<T>& a, const float* scores, const float* inverse, const float* values, int64_t count, int64_t d, T* out) {
  const int64_t padded = a.padded(), wide = a.wide();
  __m512 sums[R][D];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) sums[r][i] = _mm512_setzero_ps();
  for (int64_t t = 0; t < count; ++t) {
    __m512 row[D];
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) row[i] = _mm512_load_ps(values + t * wide + d + i * FLOAT_LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 weight = _mm512_set1_ps(scores[r * padded + t]);
#pragma GCC unroll 4
      for (int i = 0; i < D; ++i) sums[r][i] = _mm512_fmadd_ps(weight, row[i], sums[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < D; ++i) {
      const int64_t at = d + i * FLOAT_LANES;
      store_floats(out + r * a.heads * a.dim + at, _mm512_mul_ps(sums[r][i], _mm512_set1_ps(inverse[r])), lanes_of(a.dim - at));
    }
}

template <int R, class T>
AVX512 void mix_rows(const Attention<T>& a, const float* scores, const float* inverse, const float* values, int64_t count, T* out) {
  int64_t d = 0;
  for (; d + MIX_REGISTERS * FLOAT_LANES <= a.wide(); d += MIX_REGISTERS * FLOAT_LANES)
    mix<R, MIX_REGISTERS>(a, scores, inverse, values, count, d, out);
  for (; d < a.wide(); d += FLOAT_LANES) mix<R, 1>(a, scores, inverse, values, count, d, out);
}

// Some query rows of a head from `row` on. `head` is its keys and values in float32.
template <class T>
AVX512 void block(const Attention<T>& a, int64_t h, int64_t row, const float* head, float* scratch) {
  const int64_t rows = std::min(QUERIES, a.rows - row), padded = a.padded(), before = a.length - a.rows;
  const int64_t seen = a.causal ? before + row + rows : a.length, count = ceil_div(seen, KEYS) * KEYS;
  float *const queries = scratch, *const scores = queries + ceil_div(a.dim * QUERIES, FLOAT_LANES) * FLOAT_LANES;
  float* const inverse = scores + QUERIES * padded;
  const __m512 scale = _mm512_set1_ps(a.scale);
  for (int64_t r = 0; r < QUERIES; ++r) {
    alignas(64) float wide[FLOAT_LANES];
    for (int64_t d = 0; d < a.dim; d += FLOAT_LANES) {
      const T* const at = a.query + (row + r) * a.query_stride + h * a.dim + d;
      _mm512_store_ps(wide, _mm512_mul_ps(load_floats(at, r < rows ? lanes_of(a.dim - d) : __mmask16(0)), scale));
      for (int64_t i = 0; i < std::min(FLOAT_LANES, a.dim - d); ++i) queries[(d + i) * QUERIES + r] = wide[i];
    }
  }
  if (rows > MIXED) score<QUERIES>(queries, head, a.dim, count, padded, scores);
  else score<MIXED>(queries, head, a.dim, count, padded, scores);
  for (int64_t r = 0; r < rows; ++r)
    inverse[r] = exponentiate(scores + r * padded, a.bias, a.causal ? before + row + r + 1 : a.length, count);
  const float* const values = head + a.dim * padded;
  T* const out = a.out + (row * a.heads + h) * a.dim;
  const int64_t stride = a.heads * a.dim;
  int64_t r = 0;
  for (; r + MIXED <= rows; r += MIXED) mix_rows<MIXED>(a, scores + r * padded, inverse + r, values, seen, out + r * stride);
  for (; r < rows; ++r) mix_rows<1>(a, scores + r * padded, inverse + r, values, seen, out + r * stride);
}

template <class T>
void attend(const Attention<T>& a, int threads) {
  static thread_local Buffer packs;
  const int64_t parts = a.padded() / FLOAT_LANES, blocks = ceil_div(a.rows, QUERIES), group = a.heads / a.kv_heads;
  const int64_t head_bytes = a.head_floats() * sizeof(float), at_once = std::clamp<int64_t>(PACKED_BYTES / head_bytes, 1, a.kv_heads);
  float* const packed = reinterpret_cast<float*>(packs.reserve(at_once * head_bytes));
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    float* const scratch = reinterpret_cast<float*>(own.reserve((a.dim + a.padded() + 2) * QUERIES * sizeof(float) + 64));
    for (int64_t first = 0; first < a.kv_heads; first += at_once) {
      const int64_t heads = std::min(at_once, a.kv_heads - first);
#pragma omp for schedule(dynamic)
      for (int64_t part = 0; part < heads * parts; ++part) {
        const int64_t head = part / parts, key = part % parts * FLOAT_LANES;
        float* const to = packed + head * a.head_floats();
        turn_keys(a, a.keys + (first + head) * a.head_stride, key, to);
        widen_values(a, a.values + (first + head) * a.head_stride, key, to + a.dim * a.padded());
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < heads * group * blocks; ++task) {
        const int64_t h = task / blocks, row = (blocks - 1 - task % blocks) * QUERIES;  // the longest first
        block(a, first * group + h, row, packed + h / group * a.head_floats(), scratch);
      }
    }
  }
}

}  // namespace

extern "C" void attend_rows(const void* query, const void* keys, const void* values, const void* bias, void* out, int64_t query_stride,
                            int64_t head_stride, int64_t rows, int64_t length, int64_t heads, int64_t kv_heads, int64_t dim, float scale,
                            int causal, int is_bf16, int threads) {
  const auto run = [&]<class T>(const T* from) {
    attend(Attention<T>{from, static_cast<const T*>(keys), static_cast<const T*>(values), static_cast<const T*>(bias), static_cast<T*>(out),
                        query_stride, head_stride, rows, length, heads, kv_heads, dim, scale, causal != 0},
           threads);
  };
  if (is_bf16) run(static_cast<const bf16*>(query));
  else run(static_cast<const float*>(query));
}

#endif
