// See int8.h. There are two ways to the same whole numbers:
//
// - With few rows memory is the limit. A sum is over the inputs' lanes, so nothing is laid out anew, neither x nor W; the last additions
//   of eight sums are shared.
// - With many rows arithmetic is. The codes of 32 outputs are laid out anew, four inputs of 16 outputs in a register, and meet four inputs
//   of a row in all its lanes: 24 sums need two registers of weights and one of x.
//
// Of some outputs the weights that meet outliers are gathered once for all rows.

#if defined(__x86_64__)

#include <algorithm>
#include <cstring>
#include <utility>

#include "int8.h"
#include "tiles.h"

namespace int8 {

namespace {

constexpr int64_t CODES = 64;            // in a register
constexpr int64_t MANY_ROWS = 8;         // from which codes are laid out anew: as fast there, 1.4 times at 12 rows and 2.6 times at 168
constexpr int FEW = 8, SOME = 6;         // outputs that are summed side by side, with up to two rows and with four: what registers hold
constexpr int64_t PREFETCH = 4096;       // bytes, at least: narrow rows end before memory answers
constexpr int64_t PANEL = 32, QUAD = 4;  // outputs that are laid out anew together, and inputs that an instruction adds up
constexpr int64_t BLOCK_ROWS = 12;       // that meet them at a time
constexpr int64_t ROWS_BYTES = 1 << 20;  // of rounded rows that run together: they stay in an L2 cache

// What is rounded to 8 bits has 16 before, as in bitsandbytes: of float32 one code in a hundred would be another.
AVX512_INLINE __m512 load_16_bits(const bf16* at, __mmask16 lanes) { return load_floats(at, lanes); }
AVX512_INLINE __m512 load_16_bits(const float* at, __mmask16 lanes) { return _mm512_cvtph_ps(_mm512_cvtps_ph(load_floats(at, lanes), 0)); }

// Which of the values are rounded; what is no number is not.
AVX512_INLINE __mmask16 usual(__m512 x, float outlier) { return _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(outlier), _CMP_LT_OQ); }

template <class T>
AVX512 void round_row(Rounded& to, const T* x, int64_t row, float outlier) {
  const int64_t k = to.inputs;
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += FLOAT_LANES) {
    const __m512 some = load_16_bits(x + i, lanes_of(k - i));
    const __mmask16 kept = usual(some, outlier);
    largest = _mm512_mask_max_ps(largest, kept, largest, _mm512_abs_ps(some));
    for (unsigned rest = uint16_t(~kept); rest; rest &= rest - 1) {
      const int64_t column = i + __builtin_ctz(rest);
      if (to.column_of[column] < 0) to.column_of[column] = to.columns.size(), to.columns.push_back(column);
      to.place.push_back(to.column_of[column]);
      to.outliers.push_back(to_float(x[column]));
    }
  }
  to.starts.push_back(to.outliers.size());
  const float most = _mm512_reduce_max_ps(largest);
  to.scales[row] = most / 127;
  const __m512 inverse = _mm512_set1_ps(most > 0 ? 127 / most : 0.0f);
  for (int64_t i = 0; i < k; i += FLOAT_LANES) {
    const __m512 some = load_16_bits(x + i, lanes_of(k - i));
    const __m512i code = _mm512_maskz_cvtps_epi32(usual(some, outlier), _mm512_mul_ps(some, inverse));
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(code, _mm512_set1_epi32(128)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to.codes.at + row * to.stride + i), bytes);
  }
}

// A column of weights that meet outliers, for `count` outputs from `first` on: to [columns, stride].
void gather(const Weight& w, const Rounded& x, int64_t first, int64_t count, float* to, int64_t stride) {
  for (size_t c = 0; c < x.columns.size(); ++c)
    for (int64_t o = 0; o < count; ++o) to[c * stride + o] = w.codes[(first + o) * x.inputs + x.columns[c]];
}

// From whole numbers to outputs: of 16 outputs from `first` on.
template <class B>
struct Ending {
  __mmask16 lanes;
  __m512 scale, bias;
  __m512i offset;
  const float* gathered;  // [columns, stride]
  int64_t stride;

  AVX512_INLINE Ending(const Weight& w, const B* all, int64_t first, __mmask16 lanes, const float* gathered, int64_t stride)
      : lanes(lanes), gathered(gathered), stride(stride) {
    scale = _mm512_div_ps(load_floats(w.scales + first, lanes), _mm512_set1_ps(127));
    bias = all ? load_floats(all + first, lanes) : _mm512_setzero_ps();
    offset = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(lanes, w.sums + first), 7);
  }

  template <class Y>
  AVX512_INLINE void end(const Rounded& x, int64_t row, __m512i sums, Y* y) const {
    __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, offset)), _mm512_set1_ps(x.scales[row]));
    for (int64_t j = x.starts[row]; j < x.starts[row + 1]; ++j)
      found = _mm512_fmadd_ps(_mm512_set1_ps(x.outliers[j]), load_floats(gathered + x.place[j] * stride, lanes), found);
    store_floats(y, _mm512_fmadd_ps(found, scale, bias), lanes);
  }
};

// ---- few rows

// Sums of the lanes of eight registers.
AVX512_INLINE __m256i sums_of_lanes(const __m512i (&x)[8]) {
  __m512i s[8];
#pragma GCC unroll 4
  for (int j = 0; j < 8; j += 2) s[j] = _mm512_add_epi32(_mm512_unpacklo_epi32(x[j], x[j + 1]), _mm512_unpackhi_epi32(x[j], x[j + 1]));
#pragma GCC unroll 2
  for (int j = 0; j < 8; j += 4) s[j] = _mm512_add_epi32(_mm512_unpacklo_epi64(s[j], s[j + 2]), _mm512_unpackhi_epi64(s[j], s[j + 2]));
  const __m512i half = _mm512_add_epi32(_mm512_shuffle_i32x4(s[0], s[4], 0x88), _mm512_shuffle_i32x4(s[0], s[4], 0xdd));
  const __m256i low = _mm512_castsi512_si256(half), high = _mm512_extracti64x4_epi64(half, 1);
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

// R rows from `row` on, times O outputs from `first` on. The first rows fetch what the next outputs read.
template <int R, int O, class Y, class B>
AVX512_INLINE void dots(const Weight& w, const Rounded& x, int64_t row, int64_t first, const Ending<B>& ending, Y* y, int64_t stride) {
  __m512i all[R][8];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int o = 0; o < 8; ++o) all[r][o] = _mm512_setzero_si512();
  const int64_t k = x.inputs, ahead = std::max(O * k, PREFETCH);
  const int8_t* const codes = w.codes + first * k;
  const uint8_t* const in = x.row(row);
  const auto step = [&](int64_t i, __mmask64 lanes) AVX512 __attribute__((always_inline)) {
    __m512i own[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      own[o] = _mm512_maskz_loadu_epi8(lanes, codes + o * k + i);
      if (!row) _mm_prefetch(reinterpret_cast<const char*>(codes + o * k + i + ahead), _MM_HINT_T1);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i some = _mm512_loadu_si512(in + r * x.stride + i);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) all[r][o] = _mm512_dpbusd_epi32(all[r][o], some, own[o]);
    }
  };
  int64_t i = 0;
  for (; i + CODES <= k; i += CODES) step(i, ~0ull);
  if (i < k) step(i, pair_mask(k - i));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) ending.end(x, row + r, _mm512_zextsi256_si512(sums_of_lanes(all[r])), y + r * stride);
}

// All rows times O outputs.
template <int O, class Y, class B>
AVX512 void strip(const Weight& w, const Rounded& x, const B* bias, int64_t first, Y* y, int64_t stride) {
  static thread_local std::vector<float> gathered;
  gathered.resize(std::max(gathered.size(), x.columns.size() * O + FLOAT_LANES));
  gather(w, x, first, O, gathered.data(), O);
  const Ending<B> ending(w, bias, first, lanes_of(O), gathered.data(), O);
  for (int64_t row = 0; row < x.rows;) {
    Y* const here = y + row * stride;
    if (O <= SOME && x.rows - row >= 4) dots<4, O>(w, x, row, first, ending, here, stride), row += 4;
    else if (x.rows - row >= 2) dots<2, O>(w, x, row, first, ending, here, stride), row += 2;
    else dots<1, O>(w, x, row, first, ending, here, stride), row += 1;
  }
}

// ---- many rows

// Adds products of four codes each. By its intrinsic, GCC 12 copies the sums from register to register and to the stack: twice as long.
AVX512_INLINE void add_products(__m512i& sums, __m512i x, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w)); }

// The codes of `count` outputs from `first` on: to [stride / QUAD, PANEL, QUAD], zeros where there are none.
AVX512 void lay_out(const Weight& w, const Rounded& x, int64_t first, int64_t count, char* to) {
  for (int64_t half = 0; half < PANEL; half += FLOAT_LANES)
    for (int64_t i = 0; i < x.inputs; i += CODES) {
      const __mmask64 there = pair_mask(x.inputs - i);
      __m512i r[TILE_ROWS];
#pragma GCC unroll 16
      for (int j = 0; j < TILE_ROWS; ++j) {
        const int8_t* const at = w.codes + (first + half + j) * x.inputs + i;
        r[j] = _mm512_maskz_loadu_epi8(half + j < count ? there : 0, at);
        _mm_prefetch(reinterpret_cast<const char*>(at + PANEL * x.inputs), _MM_HINT_T1);  // of the outputs that come next
      }
      transpose(r);
#pragma GCC unroll 16
      for (int j = 0; j < TILE_ROWS; ++j) _mm512_store_si512(to + (i / QUAD + j) * PANEL * QUAD + half * QUAD, r[j]);
    }
}

// R rows from `row` on, times the two halves of a panel.
template <int R, class Y, class B>
AVX512 void block(const char* codes, const Rounded& x, int64_t row, const Ending<B> (&endings)[2], Y* y, int64_t stride) {
  __m512i sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
  const uint8_t* const in = x.row(row);
  for (int64_t i = 0; i < x.stride; i += QUAD) {
    const __m512i first = _mm512_load_si512(codes + i * PANEL), second = _mm512_load_si512(codes + i * PANEL + CODES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, in + r * x.stride + i, QUAD);
      const __m512i quad = _mm512_set1_epi32(four);
      add_products(sums[r][0], quad, first);
      add_products(sums[r][1], quad, second);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    endings[0].end(x, row + r, sums[r][0], y + r * stride);
    endings[1].end(x, row + r, sums[r][1], y + r * stride + FLOAT_LANES);
  }
}

// All rows, as evenly split as registers allow, times up to PANEL outputs.
template <class Y, class B, size_t... R>
AVX512 void panel(const Weight& w, const Rounded& x, const B* bias, int64_t first, int64_t count, Y* y, int64_t stride,
                  std::index_sequence<R...>) {
  constexpr void (*BLOCKS[])(const char*, const Rounded&, int64_t, const Ending<B>(&)[2], Y*, int64_t) = {block<R + 1, Y, B>...};
  static thread_local Buffer codes;
  static thread_local std::vector<float> gathered;
  lay_out(w, x, first, count, codes.reserve(x.stride * PANEL));
  gathered.resize(std::max(gathered.size(), (x.columns.size() + 1) * PANEL));
  gather(w, x, first, count, gathered.data(), PANEL);
  const Ending<B> endings[] = {{w, bias, first, lanes_of(count), gathered.data(), PANEL},
                               {w, bias, first + FLOAT_LANES, lanes_of(count - FLOAT_LANES), gathered.data() + FLOAT_LANES, PANEL}};
  const int64_t blocks = (x.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = x.rows * b / blocks, next = x.rows * (b + 1) / blocks;
    BLOCKS[next - row - 1](codes.at, x, row, endings, y + row * stride, stride);
  }
}

template <class T>
void multiply(const T* x, const Weight& w, const T* bias, T* y, int64_t rows, int64_t k, int64_t n, int threads) {
  const int64_t part = std::max(MANY_ROWS, ROWS_BYTES / k);
  Rounded rounded;
  for (int64_t row = 0; row < rows; row += part) {
    rounded.round(x + row * k, std::min(part, rows - row), k, w.outlier);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t first = 0; first < n; first += PANEL)
      outputs(w, rounded, bias, first, std::min(n, first + PANEL), y + row * n + first, n);
  }
}

}  // namespace

template <class T>
AVX512 void Rounded::round(const T* x, int64_t count, int64_t k, float outlier) {
  rows = count, inputs = k, stride = (k + CODES - 1) / CODES * CODES;
  codes.reserve(rows * stride), scales.resize(rows), starts.assign(1, 0), place.clear(), outliers.clear();
  for (const int32_t column : columns) column_of[column] = -1;
  columns.clear(), column_of.resize(std::max<size_t>(column_of.size(), k), -1);
  for (int64_t row = 0; row < rows; ++row) round_row(*this, x + row * k, row, outlier);
}

template <class Y, class B>
AVX512 void outputs(const Weight& w, const Rounded& x, const B* bias, int64_t first, int64_t last, Y* y, int64_t stride) {
  const auto each = [&](int64_t count, const auto& run) {
    for (; first + count <= last; first += count, y += count) run(count);
  };
  if (x.rows >= MANY_ROWS) {
    const auto run = [&](int64_t count) { panel(w, x, bias, first, count, y, stride, std::make_index_sequence<BLOCK_ROWS>()); };
    each(PANEL, run);
    if (first < last) run(last - first);
    return;
  }
  if (x.rows < 4) each(FEW, [&](int64_t) { strip<FEW>(w, x, bias, first, y, stride); });
  each(SOME, [&](int64_t) { strip<SOME>(w, x, bias, first, y, stride); });
  each(1, [&](int64_t) { strip<1>(w, x, bias, first, y, stride); });
}

template void Rounded::round(const float*, int64_t, int64_t, float);
template void Rounded::round(const bf16*, int64_t, int64_t, float);
template void outputs(const Weight&, const Rounded&, const float*, int64_t, int64_t, float*, int64_t);
template void outputs(const Weight&, const Rounded&, const bf16*, int64_t, int64_t, float*, int64_t);

}  // namespace int8

extern "C" void int8_linear(const void* x, const int8::Weight* w, const void* bias, void* y, int64_t rows, int64_t k, int64_t n, int is_bf16,
                            int threads) {
  const auto run = [&]<class T>(const T* from) {
    int8::multiply(from, *w, static_cast<const T*>(bias), static_cast<T*>(y), rows, k, n, threads);
  };
  if (is_bf16) run(static_cast<const bf16*>(x));
  else run(static_cast<const float*>(x));
}

#endif
