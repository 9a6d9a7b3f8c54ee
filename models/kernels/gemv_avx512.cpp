// y = x W^T for few rows of x, on AVX-512: gemv_avx512.h in threads.
// Plain C functions without torch. __init__.py calls them through ctypes and checks their arguments.

#include <cstdint>

#if defined(__x86_64__)

#include <algorithm>

#include "gemv_avx512.h"

namespace {

constexpr int64_t STRIP_BYTES = 1 << 20;      // bytes of dense W that a thread takes at a time: long reads that still fit L2 for the
                                              // next rows of x (64 KB took 1.4 times as long at one row, 128 KB 1.15 at 24)
constexpr int64_t MIN_STRIPS_PER_THREAD = 4;  // so that no thread waits long for a slower one

// Rows of W in a strip: a multiple of 12, so that blocks of 3 and of 4 fill it.
int64_t strip_rows(int64_t k, int64_t n, int threads) {
  return 12 * std::max<int64_t>(1, std::min(STRIP_BYTES / (24 * k), n / (12 * MIN_STRIPS_PER_THREAD * threads)));
}

// Strips are scheduled dynamically: rows of W differ in non-zeros, and cores in load.
template <class W, class Y>
void multiply(const W& w, const ProductTo<Y>& p, int threads) {
  if (p.n * p.k < MIN_PARALLEL_WORK) threads = 1;
  const int64_t step = strip_rows(p.k, p.n, threads);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    uint8_t* const scratch = reinterpret_cast<uint8_t*>(own.reserve(decoded_bytes(MAX_OUTPUTS * p.k)));
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < p.n; first += step) outputs(w, p, first, std::min(first + step, p.n), scratch);
  }
}

template <class W>
AVX512 void decompress_row(const W& w, int64_t row, int64_t k, bf16* out, uint8_t* scratch) {
  const int64_t prefetch_bytes = w.bytes(row, row + 1);
  typename W::RowReader weights = w.reader(row);
  const int64_t high_offset = w.decode_high_bytes(weights, w.start(row + 1), prefetch_bytes / 2, scratch);
  for (int64_t i = 0; i < k; i += PAIR_LANES) {
    const __mmask64 lanes = pair_mask(k - i);
    const Pair both = weights.next(lanes, high_offset, prefetch_bytes);
    _mm512_mask_storeu_epi16(out + i, __mmask32(lanes), both.first);
    _mm512_mask_storeu_epi16(out + i + BF16_LANES, __mmask32(lanes >> BF16_LANES), both.second);
  }
}

// Writes rows [first, last) of a matrix, dense, to out [last - first, k].
template <class W>
void decompress_rows(const W& w, bf16* out, int64_t k, int64_t first, int64_t last, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    uint8_t* const scratch = reinterpret_cast<uint8_t*>(own.reserve(decoded_bytes(k)));
#pragma omp for
    for (int64_t row = first; row < last; ++row) decompress_row(w, row, k, out + (row - first) * k, scratch);
  }
}

}  // namespace

extern "C" {

int avx512_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("popcnt");
}

void dense_gemv_avx512(const bf16* x, const bf16* weights, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n,
                       int threads) {
  multiply(Dense{weights, k}, Product{x, bias, y, rows, k, n}, threads);
}

// Sums that are not rounded, for logits.
void dense_gemv_avx512_to_float32(const bf16* x, const bf16* weights, const bf16* bias, float* y, int64_t rows, int64_t k, int64_t n,
                                  int threads) {
  multiply(Dense{weights, k}, ProductTo<float>{x, bias, y, rows, k, n}, threads);
}

void packed_gemv_avx512(const bf16* x, const Packed* w, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply(*w, Product{x, bias, y, rows, k, n}, threads);
}

void nf4_gemv_avx512(const bf16* x, const Nf4* w, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply(*w, Product{x, bias, y, rows, k, n}, threads);
}

void decompress(const Packed* w, bf16* out, int64_t k, int64_t first, int64_t last, int threads) {
  decompress_rows(*w, out, k, first, last, threads);
}

void decompress_nf4(const Nf4* w, bf16* out, int64_t k, int64_t first, int64_t last, int threads) {
  decompress_rows(*w, out, k, first, last, threads);
}
}

#else

extern "C" int avx512_supported() { return 0; }

#endif
