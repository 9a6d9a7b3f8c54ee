// y = x W^T for few rows of x, on AVX-512, in bfloat16 with float32 sums. W is dense as torch holds it, or packed.
// Plain C functions without torch. __init__.py calls them through ctypes and checks their arguments.
//
// With few rows a product is bound by reading W from memory:
// - A block takes several rows of W at once. They share the loads of x, and their additions overlap. Up to three rows of x fit the L1
//   cache, and there dense rows go one by one (1.06 to 1.35 times as fast on a Zen 5).
// - Each load prefetches what the next block reads at the same place, so memory is read in one straight line. (Without it, two rows
//   side by side took longer than one.)
// - A packed W is expanded in registers, again for each 8 rows of x. Each expanded register serves 8 products, which hide the
//   expansion. (Expanding into a buffer once for 9 to 64 rows took 1.05 to 1.3 times as long.)
//
// Each output is summed in the order of its inputs, for either format and any number of rows. So an answer does not depend on what
// else is in its batch, as long as this kernel runs (the AMX kernels sum in another order). vdpbf16ps flushes subnormals to zero.

#include <cstdint>

#if defined(__x86_64__)

#include <algorithm>

#include "weights.h"

namespace {

constexpr int MAX_ROWS = 8;                   // rows of x in a block: the sums must fit the 32 registers
constexpr int MAX_OUTPUTS = 4;                // rows of W in a block
constexpr int64_t STRIP_BYTES = 1 << 20;      // bytes of dense W that a thread takes at a time: long reads that still fit L2 for the
                                              // next rows of x (64 KB took 1.4 times as long at one row, 128 KB 1.15 at 24)
constexpr int64_t MIN_STRIPS_PER_THREAD = 4;  // so that no thread waits long for a slower one

// R rows of x from `row` on, times O rows of W from `first` on.
template <int R, int O, class W>
AVX512_INLINE void block(const W& w, const Product& p, int64_t row, int64_t first, uint8_t* scratch) {
  const int64_t prefetch_bytes = w.bytes(first, first + O);
  typename W::RowReader weights[O];
  __m512 sums[O][R];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    weights[o] = w.reader(first + o);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[o][r] = _mm512_setzero_ps();
  }
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
      for (int o = 0; o < O; ++o) sums[o][r] = _mm512_dpbf16_ps(sums[o][r], (__m512bh)inputs, (__m512bh)loaded[o].first);
      const __m512i further = _mm512_maskz_loadu_epi16(__mmask32(lanes >> BF16_LANES), at + BF16_LANES);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) sums[o][r] = _mm512_dpbf16_ps(sums[o][r], (__m512bh)further, (__m512bh)loaded[o].second);
    }
  };
  int64_t i = 0;
  for (; i + PAIR_LANES <= p.k; i += PAIR_LANES) step(i, ~0ull);
  if (i < p.k) step(i, pair_mask(p.k - i));
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    const float bias = p.bias ? to_float(p.bias[first + o]) : 0.0f;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) p.y[(row + r) * p.n + first + o] = to_bf16(_mm512_reduce_add_ps(sums[o][r]) + bias);
  }
}

template <int R, class W>
AVX512 void strip(const W& w, const Product& p, int64_t row, int64_t first, int64_t last, uint8_t* scratch) {
  constexpr int O = W::rows_at_once(R);
  static_assert(O <= MAX_OUTPUTS);
  for (; first + O <= last; first += O) block<R, O>(w, p, row, first, scratch);
  for (; first < last; ++first) block<R, 1>(w, p, row, first, scratch);
}

template <class W>
constexpr void (*STRIPS[MAX_ROWS])(const W&, const Product&, int64_t, int64_t, int64_t, uint8_t*) = {
    strip<1, W>, strip<2, W>, strip<3, W>, strip<4, W>, strip<5, W>, strip<6, W>, strip<7, W>, strip<8, W>};

// Rows of W in a strip: a multiple of 12, so that blocks of 3 and of 4 fill it.
int64_t strip_rows(int64_t k, int64_t n, int threads) {
  return 12 * std::max<int64_t>(1, std::min(STRIP_BYTES / (24 * k), n / (12 * MIN_STRIPS_PER_THREAD * threads)));
}

// Strips are scheduled dynamically: rows of W differ in non-zeros, and cores in load.
// The rows of x are split evenly: blocks of 8 and 1 take longer than blocks of 4 and 5.
template <class W>
void multiply(const W& w, const Product& p, int threads) {
  if (p.n * p.k < MIN_PARALLEL_WORK) threads = 1;
  const int64_t step = strip_rows(p.k, p.n, threads), blocks = (p.rows + MAX_ROWS - 1) / MAX_ROWS;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    uint8_t* const scratch = reinterpret_cast<uint8_t*>(own.reserve(decoded_bytes(MAX_OUTPUTS * p.k)));
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < p.n; first += step)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t row = p.rows * b / blocks, next = p.rows * (b + 1) / blocks;
        STRIPS<W>[next - row - 1](w, p, row, first, std::min(first + step, p.n), scratch);
      }
  }
}

AVX512 void decompress_row(const Packed& w, int64_t row, int64_t k, bf16* out, uint8_t* scratch) {
  const int64_t prefetch_bytes = w.bytes(row, row + 1);
  Packed::RowReader weights = w.reader(row);
  const int64_t high_offset = w.decode_high_bytes(weights, w.start(row + 1), prefetch_bytes / 2, scratch);
  for (int64_t i = 0; i < k; i += PAIR_LANES) {
    const __mmask64 lanes = pair_mask(k - i);
    const Pair both = weights.next(lanes, high_offset, prefetch_bytes);
    _mm512_mask_storeu_epi16(out + i, __mmask32(lanes), both.first);
    _mm512_mask_storeu_epi16(out + i + BF16_LANES, __mmask32(lanes >> BF16_LANES), both.second);
  }
}

}  // namespace

extern "C" {

int avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt");
}

void dense_gemv_avx512(const bf16* x, const bf16* weights, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n,
                       int threads) {
  multiply(Dense{weights, k}, Product{x, bias, y, rows, k, n}, threads);
}

void packed_gemv_avx512(const bf16* x, const Packed* w, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply(*w, Product{x, bias, y, rows, k, n}, threads);
}

// Writes rows [first, last) of a packed matrix, dense, to out [last - first, k].
void decompress(const Packed* w, bf16* out, int64_t k, int64_t first, int64_t last, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    uint8_t* const scratch = reinterpret_cast<uint8_t*>(own.reserve(decoded_bytes(k)));
#pragma omp for
    for (int64_t row = first; row < last; ++row) decompress_row(*w, row, k, out + (row - first) * k, scratch);
  }
}
}

#else

extern "C" int avx512_supported() { return 0; }

#endif
