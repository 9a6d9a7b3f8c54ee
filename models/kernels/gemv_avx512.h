// Blocks of y = x W^T for few rows of x, on AVX-512, in bfloat16 with float32 sums. W is dense as torch holds it, or packed.
//
// With few rows a product is bound by reading W from memory:
// - A block takes several rows of W at once. They share the loads of x, and their additions overlap, the last ones of eight sums too.
//   (One row at a time took 1.2 times as long on a Sapphire Rapids with 576 inputs.)
// - Each load prefetches what the next block reads at the same place, so memory is read in one straight line. (Without it, two rows
//   side by side took longer than one.)
// - A packed W is expanded in registers, again for each 8 rows of x. Each expanded register serves 8 products, which hide the
//   expansion. (Expanding into a buffer once for 9 to 64 rows took 1.05 to 1.3 times as long.)
//
// Each output is summed in the order of its inputs, for either format and any number of rows. So an answer does not depend on what
// else is in its batch, as long as this kernel runs (the AMX kernels sum in another order). vdpbf16ps flushes subnormals to zero.

#pragma once

#include "weights.h"

namespace {

AVX512_INLINE void store(bf16* at, float value) { *at = to_bf16(value); }
AVX512_INLINE void store(float* at, float value) { *at = value; }

constexpr int MAX_ROWS = 8;     // rows of x in a block: the sums must fit the 32 registers
constexpr int MAX_OUTPUTS = 8;  // rows of W in a block
constexpr int64_t MIN_PREFETCH_BYTES = 2048;  // narrow rows end before memory answers

// R rows of x from `row` on, times O rows of W from `first` on.
template <int R, int O, class W, class Y>
AVX512_INLINE void block(const W& w, const ProductTo<Y>& p, int64_t row, int64_t first, uint8_t* scratch) {
  const int64_t prefetch_bytes = std::max(w.bytes(first, first + O), MIN_PREFETCH_BYTES);
  typename W::RowReader weights[O];
  __m512 sums[O * R];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) weights[o] = w.reader(first + o);
#pragma GCC unroll 32
  for (int i = 0; i < O * R; ++i) sums[i] = _mm512_setzero_ps();
  const int64_t high_offset = w.decode_high_bytes(weights[0], w.start(first + O), 0, scratch);
  auto prefetcher = w.prefetcher(first, first + O, pair_count(p.k));
  const bf16* x = p.x + row * p.k;
  const auto step = [&](int64_t i, __mmask64 lanes) AVX512 __attribute__((always_inline)) {
    prefetcher.step();
    Pair loaded[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) loaded[o] = weights[o].next(lanes, high_offset, prefetch_bytes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const bf16* at = x + r * p.k + i;
      const __m512i inputs = _mm512_maskz_loadu_epi16(__mmask32(lanes), at);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) sums[o * R + r] = _mm512_dpbf16_ps(sums[o * R + r], (__m512bh)inputs, (__m512bh)loaded[o].first);
      const __m512i further = _mm512_maskz_loadu_epi16(__mmask32(lanes >> BF16_LANES), at + BF16_LANES);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) sums[o * R + r] = _mm512_dpbf16_ps(sums[o * R + r], (__m512bh)further, (__m512bh)loaded[o].second);
    }
  };
  int64_t i = 0;
  for (; i + PAIR_LANES <= p.k; i += PAIR_LANES) step(i, ~0ull);
  if (i < p.k) step(i, pair_mask(p.k - i));
  float totals[O * R];
  sums_of_lanes(sums, totals);
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    const float bias = p.bias ? to_float(p.bias[first + o]) : 0.0f;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(p.y + (row + r) * p.n + first + o, totals[o * R + r] + bias);
  }
}

template <int R, class W, class Y>
AVX512 void strip(const W& w, const ProductTo<Y>& p, int64_t row, int64_t first, int64_t last, uint8_t* scratch) {
  constexpr int O = W::rows_at_once(R);
  static_assert(O <= MAX_OUTPUTS);
  for (; first + O <= last; first += O) block<R, O>(w, p, row, first, scratch);
  for (; first < last; ++first) block<R, 1>(w, p, row, first, scratch);
}

template <class W, class Y>
constexpr void (*STRIPS[MAX_ROWS])(const W&, const ProductTo<Y>&, int64_t, int64_t, int64_t, uint8_t*) = {
    strip<1, W, Y>, strip<2, W, Y>, strip<3, W, Y>, strip<4, W, Y>, strip<5, W, Y>, strip<6, W, Y>, strip<7, W, Y>, strip<8, W, Y>};

// Outputs [first, last) of all rows of x. The rows are split evenly: blocks of 8 and 1 take longer than blocks of 4 and 5.
template <class W, class Y>
void outputs(const W& w, const ProductTo<Y>& p, int64_t first, int64_t last, uint8_t* scratch) {
  const int64_t blocks = (p.rows + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = p.rows * b / blocks, next = p.rows * (b + 1) / blocks;
    STRIPS<W, Y>[next - row - 1](w, p, row, first, last, scratch);
  }
}

}  // namespace
