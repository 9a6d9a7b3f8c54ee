// y = x W^T for many rows of x on AVX-512, multiplied in float32: on Intel's processors without AMX, whose float32 products are 1.8
// times as fast as their bfloat16 ones. W is dense as torch holds it, or packed.
//
// x is turned round once: up to 128 rows lie side by side, input after input. So a weight is one value for up to eight registers.
// - A chunk is 64 inputs of a strip of outputs. It is expanded to float32 once and multiplied by all blocks of rows. A chunk of x is
//   32 KB, which fits an L1 cache of 48 KB; sums wait in L2.
// - A chunk of a packed W is expanded to its non-zeros and their places, and zeros are not multiplied. With few rows the sums of one
//   output would wait for each other, so there it is expanded with its zeros, and several outputs are summed side by side.
//
// Each output is summed in an order of its own inputs, the same for any number of rows that take the same of the two ways.

#include <cstdint>

#if defined(__x86_64__)

#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace {

constexpr int MAX_VECTORS = 8;                 // registers of 16 rows in a block of rows
constexpr int SPARSE_VECTORS = 5;              // registers from which the sums of an output hide their own latency
constexpr int64_t CHUNK = PAIR_LANES;          // inputs in a chunk
constexpr int64_t STRIP_OUTPUTS = 192;         // outputs in a strip: a multiple of TILE_ROWS
constexpr int64_t MIN_STRIPS_PER_THREAD = 4;   // so that no thread waits long for a slower one
constexpr int64_t MAX_ROWS = 640;              // rows whose sums fit an L2 cache of 1 MB
constexpr int64_t UNROLL = 2;                  // non-zeros multiplied between two jumps

// Outputs that are summed side by side for so many registers of rows: 24 sums, and the registers of x.
constexpr int outputs_at_once(int vectors) { return vectors == 1 ? 16 : vectors == 5 ? 4 : 24 / vectors; }

// Rows of x in blocks, as evenly as registers allow.
struct Blocks {
  int64_t vectors, count;

  explicit Blocks(int64_t rows) : vectors(ceil_div(rows, FLOAT_LANES)), count(ceil_div(vectors, MAX_VECTORS)) {}
  int64_t start(int64_t block) const { return vectors * block / count; }  // in registers
};

// Turns 16 rows of x from `row` on round: to [inputs, 16] float32, `stride` floats between inputs.
AVX512 void turn_round(const Product& p, int64_t row, int64_t input, int64_t inputs, float* out, int64_t stride) {
  for (int64_t i = 0; i < inputs; i += FLOAT_LANES) {
    const int64_t here = std::min(FLOAT_LANES, inputs - i);
    const __mmask16 lanes = __mmask16((1u << here) - 1);
    __m512i r[TILE_ROWS];
#pragma GCC unroll 16
    for (int j = 0; j < TILE_ROWS; ++j)
      r[j] = row + j < p.rows ? _mm512_castps_si512(load_floats(p.x + (row + j) * p.k + input + i, lanes)) : _mm512_setzero_si512();
    transpose(r);
#pragma GCC unroll 16
    for (int j = 0; j < TILE_ROWS; ++j)
      if (j < here) _mm512_store_si512(out + (i + j) * stride, r[j]);
  }
}

// A chunk of a strip of W in float32. Of each output: its values, or its non-zeros, padded with zeros to UNROLL, and their places.
struct Panel {
  alignas(64) float values[STRIP_OUTPUTS][CHUNK];
  alignas(64) uint8_t places[STRIP_OUTPUTS][CHUNK];
  int64_t counts[STRIP_OUTPUTS];
};

AVX512_INLINE __m512 widen(__m512i values, int half) {
  const __m256i part = half ? _mm512_extracti64x4_epi64(values, 1) : _mm512_castsi512_si256(values);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
}

template <class RowReader>
AVX512_INLINE void expand(RowReader& row, __mmask64 lanes, int64_t high_offset, int64_t prefetch_bytes, float* to) {
  const Pair both = row.next(lanes, high_offset, prefetch_bytes);
  _mm512_store_ps(to, widen(both.first, 0));
  _mm512_store_ps(to + FLOAT_LANES, widen(both.first, 1));
  _mm512_store_ps(to + 2 * FLOAT_LANES, widen(both.second, 0));
  _mm512_store_ps(to + 3 * FLOAT_LANES, widen(both.second, 1));
}

// The next 64 weights of a packed row as non-zeros and places.
AVX512_INLINE int64_t list_nonzeros(Packed::RowReader& row, int64_t high_offset, int64_t prefetch_bytes, float* to, uint8_t* places) {
  alignas(64) static const struct Order {
    uint8_t at[64];
    constexpr Order() : at() {
      for (int i = 0; i < 64; ++i) at[i] = uint8_t(i / 2 + i % 2 * 32);
    }
  } order;
  const __mmask64 mask = *row.mask++;
  const int64_t count = __builtin_popcountll(mask);
  _mm_prefetch(reinterpret_cast<const char*>(row.at) + prefetch_bytes, _MM_HINT_T1);
  _mm512_store_si512(places, _mm512_maskz_compress_epi8(mask, _mm512_load_si512(order.at)));
#pragma GCC unroll 4
  for (int64_t i = 0; i < CHUNK; i += FLOAT_LANES) {
    const int64_t left = count - i;
    const __mmask16 lanes = left >= FLOAT_LANES ? ALL_LANES : left > 0 ? __mmask16((1u << left) - 1) : 0;
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.at + i));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.at + high_offset + i));
    const __m512i value =
        _mm512_or_si512(_mm512_slli_epi32(_mm512_cvtepu8_epi32(low), 16), _mm512_slli_epi32(_mm512_cvtepu8_epi32(high), 24));
    _mm512_store_si512(to + i, _mm512_maskz_mov_epi32(lanes, value));
  }
  row.at += count;
  return ceil_div(count, UNROLL) * UNROLL;
}

// Adds the products of O outputs, with their zeros, and V registers of rows over `inputs` to sums [O, stride].
template <int V, int O>
AVX512_INLINE void dense_block(const float (*w)[CHUNK], const float* x, int64_t inputs, float* sums, int64_t stride) {
  __m512 s[O][V];
#pragma GCC unroll 16
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) s[o][v] = _mm512_load_ps(sums + o * stride + v * FLOAT_LANES);
  for (int64_t i = 0; i < inputs; ++i, x += V * FLOAT_LANES) {
    if constexpr (V > O) {  // the fewer ones stay in registers
      __m512 weights[O];
#pragma GCC unroll 16
      for (int o = 0; o < O; ++o) weights[o] = _mm512_set1_ps(w[o][i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        __m512 in = _mm512_load_ps(x + v * FLOAT_LANES);
        asm("" : "+v"(in));  // loaded once: GCC would load it again in every product
#pragma GCC unroll 16
        for (int o = 0; o < O; ++o) s[o][v] = _mm512_fmadd_ps(weights[o], in, s[o][v]);
      }
    } else {
      __m512 in[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) in[v] = _mm512_load_ps(x + v * FLOAT_LANES);
#pragma GCC unroll 16
      for (int o = 0; o < O; ++o) {
        const __m512 weight = _mm512_set1_ps(w[o][i]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) s[o][v] = _mm512_fmadd_ps(weight, in[v], s[o][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) _mm512_store_ps(sums + o * stride + v * FLOAT_LANES, s[o][v]);
}

// The same of one output's non-zeros.
template <int V>
AVX512_INLINE void sparse_block(const float* w, const uint8_t* places, int64_t count, const float* x, float* sums) {
  __m512 s[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) s[v] = _mm512_load_ps(sums + v * FLOAT_LANES);
  for (int64_t i = 0; i < count; i += UNROLL)
#pragma GCC unroll 4
    for (int64_t j = i; j < i + UNROLL; ++j) {
      const __m512 weight = _mm512_set1_ps(w[j]);
      const float* in = x + int64_t(places[j]) * V * FLOAT_LANES;
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) s[v] = _mm512_fmadd_ps(weight, _mm512_load_ps(in + v * FLOAT_LANES), s[v]);
    }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) _mm512_store_ps(sums + v * FLOAT_LANES, s[v]);
}

// One chunk of a strip times one block of rows; sums [outs, V, 16].
template <int V, bool SPARSE>
AVX512 void panel_block(const Panel& w, const float* x, int64_t outs, int64_t inputs, float* sums) {
  constexpr int O = outputs_at_once(V), STRIDE = V * FLOAT_LANES;
  int64_t o = 0;
  if constexpr (SPARSE) {
    for (; o < outs; ++o) sparse_block<V>(w.values[o], w.places[o], w.counts[o], x, sums + o * STRIDE);
  } else {
    for (; o + O <= outs; o += O) dense_block<V, O>(w.values + o, x, inputs, sums + o * STRIDE, STRIDE);
    for (; o < outs; ++o) dense_block<V, 1>(w.values + o, x, inputs, sums + o * STRIDE, STRIDE);
  }
}

using PanelBlock = void (*)(const Panel&, const float*, int64_t, int64_t, float*);
constexpr PanelBlock DENSE_BLOCKS[MAX_VECTORS] = {
    panel_block<1, false>, panel_block<2, false>, panel_block<3, false>, panel_block<4, false>,
    panel_block<5, false>, panel_block<6, false>, panel_block<7, false>, panel_block<8, false>};
constexpr PanelBlock SPARSE_BLOCKS[MAX_VECTORS] = {
    panel_block<1, true>, panel_block<2, true>, panel_block<3, true>, panel_block<4, true>,
    panel_block<5, true>, panel_block<6, true>, panel_block<7, true>, panel_block<8, true>};

// Expands a chunk of the strip's rows.
template <bool SPARSE, class W>
AVX512_INLINE void expand_chunk(const W& w, typename W::RowReader* rows, int64_t outs, int64_t inputs, Panel& panel, uint8_t* scratch) {
  constexpr int64_t PREFETCH_BYTES = 256;
  for (int64_t o = 0; o < outs; ++o) {
    const int64_t high_offset = w.decode_high_bytes(rows[o], w.end(rows[o], 1), PREFETCH_BYTES / 2, scratch);
    if constexpr (SPARSE) panel.counts[o] = list_nonzeros(rows[o], high_offset, PREFETCH_BYTES, panel.values[o], panel.places[o]);
    else expand(rows[o], pair_mask(inputs), high_offset, PREFETCH_BYTES, panel.values[o]);
  }
}

struct Scratch {
  Panel panel;
  uint8_t high_bytes[4 * PAIR_LANES];
  alignas(64) float tile[TILE_ROWS * TILE_ROWS];
};

// Computes outputs [first, last). x_blocks: block after block [k, vectors, 16].
template <bool SPARSE, class W>
AVX512 void strip(const W& w, const Product& p, const Blocks& blocks, const float* x_blocks, int64_t first, int64_t last,
                  Scratch& scratch, float* sums) {
  const int64_t outs = last - first;
  typename W::RowReader rows[STRIP_OUTPUTS];
  for (int64_t o = 0; o < outs; ++o) rows[o] = w.reader(first + o);
  std::memset(sums, 0, outs * blocks.vectors * FLOAT_LANES * sizeof(float));
  for (int64_t input = 0; input < p.k; input += CHUNK) {
    const int64_t inputs = std::min(CHUNK, p.k - input);
    expand_chunk<SPARSE>(w, rows, outs, inputs, scratch.panel, scratch.high_bytes);
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t start = blocks.start(block), vectors = blocks.start(block + 1) - start;
      const float* x = x_blocks + (start * p.k + input * vectors) * FLOAT_LANES;
      (SPARSE ? SPARSE_BLOCKS : DENSE_BLOCKS)[vectors - 1](scratch.panel, x, outs, inputs, sums + start * outs * FLOAT_LANES);
    }
  }
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t start = blocks.start(block), vectors = blocks.start(block + 1) - start;
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t o = 0; o < outs; o += TILE_ROWS) {
        const float* from = sums + (start * outs + o * vectors + v) * FLOAT_LANES;
        for (int64_t i = 0; i < std::min(TILE_ROWS, outs - o); ++i)
          _mm512_store_ps(scratch.tile + i * TILE_ROWS, _mm512_load_ps(from + i * vectors * FLOAT_LANES));
        store_sums(p, scratch.tile, (start + v) * FLOAT_LANES, first + o);
      }
  }
}

template <bool SPARSE, class W>
void multiply(const W& w, const Product& p, int threads) {
  static thread_local Buffer packs;
  const Blocks blocks(p.rows);
  if (p.n * p.k < MIN_PARALLEL_WORK) threads = 1;
  const int64_t most = p.n / (TILE_ROWS * MIN_STRIPS_PER_THREAD * threads) * TILE_ROWS;
  const int64_t step = std::max(TILE_ROWS, std::min(STRIP_OUTPUTS, most));
  float* const x_blocks = reinterpret_cast<float*>(packs.reserve(blocks.vectors * FLOAT_LANES * p.k * sizeof(float)));
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    Scratch* const scratch = reinterpret_cast<Scratch*>(own.reserve(sizeof(Scratch) + step * blocks.vectors * 64));
#pragma omp for schedule(dynamic)
    for (int64_t vector = 0; vector < blocks.vectors; ++vector) {
      const int64_t block = ((vector + 1) * blocks.count - 1) / blocks.vectors;
      const int64_t start = blocks.start(block), vectors = blocks.start(block + 1) - start;
      turn_round(p, vector * FLOAT_LANES, 0, p.k, x_blocks + (start * p.k + (vector - start)) * FLOAT_LANES, vectors * FLOAT_LANES);
    }
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < p.n; first += step)
      strip<SPARSE>(w, p, blocks, x_blocks, first, std::min(first + step, p.n), *scratch, reinterpret_cast<float*>(scratch + 1));
  }
}

// Takes so many rows at a time that their sums fit the cache, as evenly as blocks allow.
template <bool SPARSE, class W>
void multiply_all(const W& w, Product p, int threads) {
  constexpr int64_t BLOCK = MAX_VECTORS * FLOAT_LANES;
  const int64_t all = p.rows, some = ceil_div(ceil_div(all, ceil_div(all, MAX_ROWS)), BLOCK) * BLOCK;
  for (int64_t row = 0; row < all; row += some, p.x += some * p.k, p.y += some * p.n) {
    p.rows = std::min(some, all - row);
    multiply<SPARSE>(w, p, threads);
  }
}

}  // namespace

extern "C" {

// Whether this processor, which has no AMX, multiplies faster in float32 than in bfloat16: AMD's take half as long in bfloat16.
int float32_faster() { return __builtin_cpu_is("intel"); }

void dense_gemm_avx512(const bf16* x, const bf16* weights, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n,
                       int threads) {
  multiply_all<false>(Dense{weights, k}, Product{x, bias, y, rows, k, n}, threads);
}

void packed_gemm_avx512(const bf16* x, const Packed* w, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  if (rows > (SPARSE_VECTORS - 1) * FLOAT_LANES) multiply_all<true>(*w, Product{x, bias, y, rows, k, n}, threads);
  else multiply_all<false>(*w, Product{x, bias, y, rows, k, n}, threads);
}

void nf4_gemm_avx512(const bf16* x, const Nf4* w, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply_all<false>(*w, Product{x, bias, y, rows, k, n}, threads);
}
}

#endif
