// The operands of a product, and readers of a dense or a packed weight: 64 values of a row at a time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "floats.h"

constexpr int64_t BF16_LANES = 32;               // in a register
constexpr int64_t PAIR_LANES = 2 * BF16_LANES;   // in the two registers that are read at a time
constexpr int64_t MIN_PARALLEL_WORK = 64 << 10;  // weights below which more threads cost more than they save

// y = x W^T + bias.
template <class Y>
struct ProductTo {
  const bf16* x;     // [rows, k]
  const bf16* bias;  // [n], or null
  Y* y;              // [rows, n]
  int64_t rows, k, n;
};
using Product = ProductTo<bf16>;

// 64 consecutive values of a row of W.
struct Pair {
  __m512i first, second;
};

// Dense, Packed and Nf4 have the same members, so that the kernels are templates over them. RowReader::next reads 64 values and prefetches
// `prefetch_bytes` further on; Prefetcher fetches what a packed weight keeps beside them.

struct Dense {
  const bf16* weights;  // [n, k]
  int64_t k;

  struct RowReader {
    const bf16* at;

    AVX512_INLINE Pair next(__mmask64 lanes, int64_t, int64_t prefetch_bytes) {
      const Pair w{_mm512_maskz_loadu_epi16(__mmask32(lanes), at),
                   _mm512_maskz_loadu_epi16(__mmask32(lanes >> BF16_LANES), at + BF16_LANES)};
      _mm_prefetch(reinterpret_cast<const char*>(at) + prefetch_bytes, _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(at + BF16_LANES) + prefetch_bytes, _MM_HINT_T1);
      at += PAIR_LANES;
      return w;
    }
  };

  struct Prefetcher {
    void step() {}
  };

  // Rows of W that a block takes together for so many rows of x. Their sums must fit the registers.
  static constexpr int rows_at_once(int rows) { return rows <= 2 ? 8 : rows <= 4 ? 4 : 3; }
  RowReader reader(int64_t o) const { return {weights + o * k}; }
  Prefetcher prefetcher(int64_t, int64_t, int64_t) const { return {}; }
  int64_t start(int64_t) const { return 0; }
  int64_t end(const RowReader&, int64_t) const { return 0; }
  AVX512_INLINE int64_t decode_high_bytes(const RowReader&, int64_t, int64_t, uint8_t*) const { return 0; }
  int64_t bytes(int64_t first, int64_t last) const { return (last - first) * k * 2; }
};

// The non-zeros of W in 12 bits each, without loss: a low byte, and a 4-bit code for the high byte (sign and most of the exponent),
// which is nearly always one of 16. The others, a few in a hundred thousand, are exceptions: patched when a row's codes are decoded.
//
// Low and high bytes are expanded to their places separately, then merged by shifts. Of 64 bytes the even ones belong to the first 32
// values and the odd ones to the others, so the shifts run beside the shuffles of the expansion. (Merging first and expanding values
// took 1.2 times as long at one row.)
struct Packed {
  const uint8_t* low_bytes;   // of the non-zeros, row after row, and PAIR_LANES more that may be read
  const uint8_t* codes;       // 32 bytes for 64 non-zeros: lower halves for the first 32, upper halves for the others
  const uint8_t* codebook;    // [16], the high byte of each code
  const int64_t* exceptions;  // ascending, index << 8 | high byte of non-zeros without a code; INT64_MAX ends them
  const uint64_t* masks;      // [n, pairs], bit 2 i (+ 1) of pair j for weight 64 j + i (+ 32); none set beyond k
  const int64_t* starts;      // [n + 1, 2], where each row's non-zeros start, and its exceptions
  int64_t pairs;

  struct RowReader {
    const uint8_t* at;  // in low_bytes
    const uint64_t* mask;
    const int64_t* exceptions;

    // high_offset: bytes from a low byte to its decoded high byte.
    AVX512_INLINE Pair next(__mmask64, int64_t high_offset, int64_t prefetch_bytes) {
      const __m512i low = _mm512_maskz_expand_epi8(*mask, _mm512_loadu_si512(at));
      const __m512i up = _mm512_maskz_expand_epi8(*mask, _mm512_loadu_si512(at + high_offset));
      _mm_prefetch(reinterpret_cast<const char*>(at) + prefetch_bytes, _MM_HINT_T1);
      at += __builtin_popcountll(*mask++);
      const __m512i even = _mm512_set1_epi16(0xff);
      constexpr int SELECT = 0xca;  // where the first has ones the second, else the third
      return {_mm512_ternarylogic_epi32(even, low, _mm512_slli_epi16(up, 8), SELECT),
              _mm512_ternarylogic_epi32(even, _mm512_srli_epi16(low, 8), up, SELECT)};
    }
  };

  // Fetches the codes and masks of the next rows, evenly over the steps of these.
  struct Prefetcher {
    const char *code, *mask;
    int64_t codes, masks;  // bytes a step

    AVX512_INLINE void step() {
      _mm_prefetch(code, _MM_HINT_T1);
      _mm_prefetch(mask, _MM_HINT_T1);
      code += codes, mask += masks;
    }
  };

  Prefetcher prefetcher(int64_t first, int64_t last, int64_t steps) const {
    const int64_t held = (last - first) * pairs * int64_t(sizeof(uint64_t));
    return {reinterpret_cast<const char*>(codes + start(last) / 2), reinterpret_cast<const char*>(masks + last * pairs),
            bytes(first, last) / 2 / steps + 1, held / steps + 1};
  }

  // As in Dense; the rows of a block share the cost of decoding.
  static constexpr int rows_at_once(int rows) { return rows <= 4 ? 4 : 3; }
  RowReader reader(int64_t o) const { return {low_bytes + starts[2 * o], masks + o * pairs, exceptions + starts[2 * o + 1]}; }
  int64_t start(int64_t o) const { return starts[2 * o]; }

  // Index of the first non-zero after the row's next `count` pairs.
  int64_t end(const RowReader& row, int64_t count) const {
    int64_t place = row.at - low_bytes;
    for (int64_t pair = 0; pair < count; ++pair) place += __builtin_popcountll(row.mask[pair]);
    return place;
  }

  // Decodes the high bytes of the non-zeros from the reader's to `end` into `scratch`. Prefetches codes unless prefetch_bytes is 0.
  // Returns high_offset.
  AVX512_INLINE int64_t decode_high_bytes(const RowReader& row, int64_t end, int64_t prefetch_bytes, uint8_t* scratch) const {
    // The codebook is repeated four times in its register, so only the lowest four bits of an index count.
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const int64_t first = (row.at - low_bytes) / PAIR_LANES * PAIR_LANES;
    const uint8_t* code = codes + first / 2;
    for (int64_t place = 0; place < end - first; place += PAIR_LANES, code += BF16_LANES) {
      const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(code)));
      _mm512_storeu_si512(scratch + place, _mm512_permutexvar_epi8(_mm512_srlv_epi16(both, shifts), table));
      if (prefetch_bytes) _mm_prefetch(reinterpret_cast<const char*>(code) + prefetch_bytes, _MM_HINT_T1);
    }
    for (const int64_t* one = row.exceptions; *one >> 8 < end; ++one)
      if (*one >> 8 >= first) scratch[(*one >> 8) - first] = uint8_t(*one);
    return scratch - (low_bytes + first);
  }

  int64_t bytes(int64_t first, int64_t last) const { return starts[2 * last] - starts[2 * first]; }  // low ones
};

// NF4 (QLoRA, arXiv 2305.14314): 64 weights of a row share a scale, and each is one of 16 values in units of it, rounded to bfloat16.
// Rows are whole blocks.
struct Nf4 {
  const uint8_t* codes;  // [n, k / 64, 32]: lower halves for the first 32 weights, upper halves for the others
  const float* scales;   // [n, k / 64]
  const float* values;   // [16]
  int64_t k;

  struct RowReader {
    const uint8_t* at;
    const float *scale, *values;

    AVX512_INLINE Pair next(__mmask64, int64_t, int64_t prefetch_bytes) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(*scale++));
      const __m512i table = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(scaled));  // an index has four bits
      const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
      _mm_prefetch(reinterpret_cast<const char*>(at) + prefetch_bytes, _MM_HINT_T1);
      at += BF16_LANES;
      return {_mm512_permutexvar_epi16(_mm512_and_si512(both, _mm512_set1_epi16(15)), table),
              _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), table)};
    }
  };

  using Prefetcher = Dense::Prefetcher;

  // As in Packed.
  static constexpr int rows_at_once(int rows) { return rows <= 4 ? 4 : 3; }
  RowReader reader(int64_t o) const { return {codes + o * k / 2, scales + o * k / PAIR_LANES, values}; }
  Prefetcher prefetcher(int64_t, int64_t, int64_t) const { return {}; }
  int64_t start(int64_t) const { return 0; }
  int64_t end(const RowReader&, int64_t) const { return 0; }
  AVX512_INLINE int64_t decode_high_bytes(const RowReader&, int64_t, int64_t, uint8_t*) const { return 0; }
  int64_t bytes(int64_t first, int64_t last) const { return (last - first) * k / 2; }
};

// Scratch bytes for the high bytes of a row of k.
inline int64_t decoded_bytes(int64_t k) { return (k + 3 * PAIR_LANES - 1) / PAIR_LANES * PAIR_LANES; }

// Memory that a thread keeps between products; it only grows.
struct Buffer {
  char* at = nullptr;
  int64_t size = 0;

  char* reserve(int64_t wanted) {
    if (wanted > size) {
      std::free(at);
      size = (wanted + 4095) / 4096 * 4096;
      at = static_cast<char*>(std::aligned_alloc(4096, size));
    }
    return at;
  }
  ~Buffer() { std::free(at); }
};

// Mask of a pair, and of a word of 32, when `left` inputs remain.
inline __mmask64 pair_mask(int64_t left) { return left >= PAIR_LANES ? ~0ull : left > 0 ? (1ull << left) - 1 : 0; }

inline __mmask32 lane_mask(int64_t left) { return left >= BF16_LANES ? ~0u : left > 0 ? (1u << left) - 1 : 0; }

inline int64_t pair_count(int64_t k) { return (k + PAIR_LANES - 1) / PAIR_LANES; }
inline int64_t word_count(int64_t k) { return (k + BF16_LANES - 1) / BF16_LANES; }
