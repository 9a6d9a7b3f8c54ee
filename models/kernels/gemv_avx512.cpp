// y = x W^T for few rows of x, in bfloat16 with float32 sums: W dense as torch holds it, or packed to its non-zeros.
// Plain C functions, called through ctypes by __init__.py, which checks what it hands over; built without torch.
//
// With few rows a product takes as long as W takes to arrive from memory, and three things keep the rest out of its way:
// - Several output rows are worked on at once: they share the loads of x, and their chains of additions overlap. But for three
//   rows of x or fewer, which stay in the first-level cache, dense rows go one by one (1.06 to 1.35 times as fast on a Zen 5).
// - Each load asks for what the next such block will read at the same place. So memory is walked in one straight line,
//   as it likes best, though several rows are read side by side (measured: two such rows without this took longer than one).
// - A packed W is expanded in registers, for each block of 8 rows of x anew: every expanded register then serves 8
//   products, so that expanding hides behind them. (Expanding once into a buffer for 9 to 64 rows took 1.05 to 1.3 times as long.)
//
// Every output is one chain of additions in the order of its inputs, in either form and with any number of rows: as long as
// vectors do it, an answer does not depend on who shares its batch (tiles add in another order, see there). Subnormal numbers
// count as zero (vdpbf16ps has no other way).

#include <cstdint>

#if defined(__x86_64__)

#include <algorithm>

#include "weights.h"

namespace {

constexpr int ROWS = 8;                      // rows of x a block takes at most: sums must fit the 32 registers
constexpr int OUTS = 4;                      // rows of W a block takes at most: what is unpacked must fit its buffer
constexpr int64_t STRIP = 1 << 20;           // bytes of dense W that a thread takes at a time: long lines, and near enough in
                                             // L2 for further rows (64 KB took 1.4 times as long at one row, 128 KB 1.15 at 24)
constexpr int64_t SHARES = 4;                // strips a thread gets at least, so that a slower one is not waited for

// R rows of x from `row` on, times O rows of W from `first` on.
template <int R, int O, class W>
WIDE_INLINE void block(const W& w, const Product& p, int64_t row, int64_t first, uint8_t* scratch) {
  const int64_t ahead = w.bytes(first, first + O);
  typename W::Row weights[O];
  __m512 sums[O][R];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    weights[o] = w.open(first + o);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[o][r] = _mm512_setzero_ps();
  }
  const int64_t apart = w.unpack(weights[0], w.start(first + O), 0, scratch);
  auto asking = w.ask(first, first + O, pairs_for(p.k));
  const bf16* x = p.x + row * p.k;
  const auto step = [&](int64_t i, __mmask64 lanes) WIDE __attribute__((always_inline)) {
    asking.step();
    Two loaded[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) loaded[o] = weights[o].next(lanes, apart, ahead);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const bf16* at = x + r * p.k + i;
      const __m512i inputs = _mm512_maskz_loadu_epi16(__mmask32(lanes), at);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) sums[o][r] = _mm512_dpbf16_ps(sums[o][r], (__m512bh)inputs, (__m512bh)loaded[o].first);
      const __m512i further = _mm512_maskz_loadu_epi16(__mmask32(lanes >> LANES), at + LANES);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) sums[o][r] = _mm512_dpbf16_ps(sums[o][r], (__m512bh)further, (__m512bh)loaded[o].second);
    }
  };
  int64_t i = 0;
  for (; i + BOTH <= p.k; i += BOTH) step(i, ~0ull);
  if (i < p.k) step(i, both_of(p.k - i));
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    const float bias = p.bias ? widen(p.bias[first + o]) : 0.0f;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) p.y[(row + r) * p.n + first + o] = narrow(_mm512_reduce_add_ps(sums[o][r]) + bias);
  }
}

template <int R, class W>
WIDE void strip(const W& w, const Product& p, int64_t row, int64_t first, int64_t last, uint8_t* scratch) {
  constexpr int O = W::together(R);
  static_assert(O <= OUTS);
  for (; first + O <= last; first += O) block<R, O>(w, p, row, first, scratch);
  for (; first < last; ++first) block<R, 1>(w, p, row, first, scratch);
}

template <class W>
constexpr void (*STRIPS[ROWS])(const W&, const Product&, int64_t, int64_t, int64_t, uint8_t*) = {
    strip<1, W>, strip<2, W>, strip<3, W>, strip<4, W>, strip<5, W>, strip<6, W>, strip<7, W>, strip<8, W>};

// Output rows in a strip: a multiple of 12, so that blocks of 3 and of 4 leave none over.
int64_t strip_rows(int64_t k, int64_t n, int threads) {
  return 12 * std::max<int64_t>(1, std::min(STRIP / (24 * k), n / (12 * SHARES * threads)));
}

// Strips go to whichever thread is free: rows of W may differ in non-zeros, and cores in what else they do.
// The rows of x are split evenly, for a block of 8 and one of 1 take longer than two of 4 and 5.
template <class W>
void multiply(const W& w, const Product& p, int threads) {
  if (p.n * p.k < SERIAL) threads = 1;
  const int64_t step = strip_rows(p.k, p.n, threads), blocks = (p.rows + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    uint8_t* const scratch = reinterpret_cast<uint8_t*>(own.of(unpacked(OUTS * p.k)));
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < p.n; first += step)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t row = p.rows * b / blocks, next = p.rows * (b + 1) / blocks;
        STRIPS<W>[next - row - 1](w, p, row, first, std::min(first + step, p.n), scratch);
      }
  }
}

WIDE void decompress_row(const Packed& w, int64_t row, int64_t k, bf16* out, uint8_t* scratch) {
  const int64_t ahead = w.bytes(row, row + 1);
  Packed::Row weights = w.open(row);
  const int64_t apart = w.unpack(weights, w.start(row + 1), ahead / 2, scratch);
  for (int64_t i = 0; i < k; i += BOTH) {
    const __mmask64 lanes = both_of(k - i);
    const Two both = weights.next(lanes, apart, ahead);
    _mm512_mask_storeu_epi16(out + i, __mmask32(lanes), both.first);
    _mm512_mask_storeu_epi16(out + i + LANES, __mmask32(lanes >> LANES), both.second);
  }
}

}  // namespace

extern "C" {

int avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt");
}

void dense_gemv_avx512(const bf16* x, const bf16* weights, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply(Dense{weights, k}, Product{x, bias, y, rows, k, n}, threads);
}

void packed_gemv_avx512(const bf16* x, const Packed* w, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply(*w, Product{x, bias, y, rows, k, n}, threads);
}

// Rows [first, last) of a packed matrix as dense ones, to out [last - first, k].
void decompress(const Packed* w, bf16* out, int64_t k, int64_t first, int64_t last, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    uint8_t* const scratch = reinterpret_cast<uint8_t*>(own.of(unpacked(k)));
#pragma omp for
    for (int64_t row = first; row < last; ++row) decompress_row(*w, row, k, out + (row - first) * k, scratch);
  }
}
}

#else

extern "C" int avx512_supported() { return 0; }

#endif
