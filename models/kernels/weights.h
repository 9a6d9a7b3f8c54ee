// What is multiplied, and how a weight is read: 64 values of a row at a time, dense as torch holds them or packed.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "floats.h"

constexpr int64_t LANES = 32;         // weights a register holds
constexpr int64_t BOTH = 2 * LANES;   // weights that are read at a time
constexpr int64_t SERIAL = 64 << 10;  // weights below which waking other threads costs more than they save

struct Product {
  const bf16* x;     // [rows, k]
  const bf16* bias;  // [n], or null
  bf16* y;           // [rows, n]
  int64_t rows, k, n;
};

// The next 64 values of a row.
struct Two {
  __m512i first, second;
};

// Each load asks for what lies `ahead` bytes behind it, which will be read soon; what else will be read is asked for by `Ask`.

struct Dense {
  const bf16* weights;  // [n, k]
  int64_t k;

  struct Row {
    const bf16* at;

    WIDE_INLINE Two next(__mmask64 lanes, int64_t, int64_t ahead) {
      const Two w{_mm512_maskz_loadu_epi16(__mmask32(lanes), at), _mm512_maskz_loadu_epi16(__mmask32(lanes >> LANES), at + LANES)};
      _mm_prefetch(reinterpret_cast<const char*>(at) + ahead, _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(at + LANES) + ahead, _MM_HINT_T1);
      at += BOTH;
      return w;
    }
  };

  struct Ask {
    void step() {}
  };

  // Rows that are worked on at once with so many rows of x: no more than sums find registers for, nor than pay.
  static constexpr int together(int rows) { return rows <= 3 ? 1 : rows == 4 ? 4 : 3; }
  Row open(int64_t o) const { return {weights + o * k}; }
  Ask ask(int64_t, int64_t, int64_t) const { return {}; }
  int64_t start(int64_t) const { return 0; }
  int64_t end(const Row&, int64_t) const { return 0; }
  WIDE_INLINE int64_t unpack(const Row&, int64_t, int64_t, uint8_t*) const { return 0; }
  int64_t bytes(int64_t first, int64_t last) const { return (last - first) * k * 2; }
};

// The non-zeros of W in 12 bits each, without loss. The lower byte of a value is held as it is. The upper one, its sign and all but
// the last bit of its exponent, is one of the 16 commonest but for a few in a hundred thousand, so that a code of 4 bits says which,
// and those few are put right when the codes of some rows are unpacked, before these are read.
//
// Bytes are expanded to their places and not values: of 64 lower and 64 upper bytes the even ones belong to the first 32 values and
// the odd ones to the others, so that shifts put them together, which run beside the shuffles that expanding needs. (Unpacking
// values and expanding those took 1.2 times as long at one row.)
struct Packed {
  const uint8_t* lower;    // of the non-zeros, row after row, and BOTH more that may be read
  const uint8_t* codes;    // of 64 non-zeros 32 bytes: the lower halves are of the first 32
  const uint8_t* upper;    // [16], what the codes stand for
  const int64_t* rare;     // ascending, place << 8 | upper byte of non-zeros that no code stands for; behind the last, INT64_MAX
  const uint64_t* masks;   // [n, pairs], bit 2 i (+ 1) of pair j for weight 64 j + i (+ 32); none set beyond k
  const int64_t* starts;   // [n + 1, 2], where each row's non-zeros start and its rare ones
  int64_t pairs;

  struct Row {
    const uint8_t* at;  // of `lower`
    const uint64_t* mask;
    const int64_t* rare;

    // `apart`: how far the unpacked upper bytes lie behind the lower ones.
    WIDE_INLINE Two next(__mmask64, int64_t apart, int64_t ahead) {
      const __m512i low = _mm512_maskz_expand_epi8(*mask, _mm512_loadu_si512(at));
      const __m512i up = _mm512_maskz_expand_epi8(*mask, _mm512_loadu_si512(at + apart));
      _mm_prefetch(reinterpret_cast<const char*>(at) + ahead, _MM_HINT_T1);
      at += __builtin_popcountll(*mask++);
      const __m512i even = _mm512_set1_epi16(0xff);
      constexpr int SELECT = 0xca;  // where the first has ones the second, else the third
      return {_mm512_ternarylogic_epi32(even, low, _mm512_slli_epi16(up, 8), SELECT),
              _mm512_ternarylogic_epi32(even, _mm512_srli_epi16(low, 8), up, SELECT)};
    }
  };

  // Asks for as many codes and masks as are behind those of some rows, evenly over `steps`.
  struct Ask {
    const char *code, *mask;
    int64_t codes, masks;  // bytes a step

    WIDE_INLINE void step() {
      _mm_prefetch(code, _MM_HINT_T1);
      _mm_prefetch(mask, _MM_HINT_T1);
      code += codes, mask += masks;
    }
  };

  Ask ask(int64_t first, int64_t last, int64_t steps) const {
    const int64_t held = (last - first) * pairs * int64_t(sizeof(uint64_t));
    return {reinterpret_cast<const char*>(codes + start(last) / 2), reinterpret_cast<const char*>(masks + last * pairs),
            bytes(first, last) / 2 / steps + 1, held / steps + 1};
  }

  // As in `Dense`; what unpacking costs is shared by the rows of a block.
  static constexpr int together(int rows) { return rows <= 4 ? 4 : 3; }
  Row open(int64_t o) const { return {lower + starts[2 * o], masks + o * pairs, rare + starts[2 * o + 1]}; }
  int64_t start(int64_t o) const { return starts[2 * o]; }

  // Where the row's next `count` pairs end.
  int64_t end(const Row& row, int64_t count) const {
    int64_t place = row.at - lower;
    for (int64_t pair = 0; pair < count; ++pair) place += __builtin_popcountll(row.mask[pair]);
    return place;
  }

  // Unpacks upper bytes from where the row is to `end`, to `scratch`, and asks for codes that many bytes ahead, unless that is 0.
  // Returns how far they lie behind the lower ones.
  WIDE_INLINE int64_t unpack(const Row& row, int64_t end, int64_t ahead, uint8_t* scratch) const {
    // The table stands in its register four times, so that of a code's byte only the lowest four bits count.
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(upper)));
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const int64_t first = (row.at - lower) / BOTH * BOTH;
    const uint8_t* code = codes + first / 2;
    for (int64_t place = 0; place < end - first; place += BOTH, code += LANES) {
      const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(code)));
      _mm512_storeu_si512(scratch + place, _mm512_permutexvar_epi8(_mm512_srlv_epi16(both, shifts), table));
      if (ahead) _mm_prefetch(reinterpret_cast<const char*>(code) + ahead, _MM_HINT_T1);
    }
    for (const int64_t* one = row.rare; *one >> 8 < end; ++one)
      if (*one >> 8 >= first) scratch[(*one >> 8) - first] = uint8_t(*one);
    return scratch - (lower + first);
  }

  int64_t bytes(int64_t first, int64_t last) const { return starts[2 * last] - starts[2 * first]; }  // the lower ones
};

// Bytes that are enough to unpack a row of k.
inline int64_t unpacked(int64_t k) { return (k + 3 * BOTH - 1) / BOTH * BOTH; }

// Grows and never shrinks: what one product needed the next one like it finds.
struct Buffer {
  char* at = nullptr;
  int64_t size = 0;

  char* of(int64_t wanted) {
    if (wanted > size) {
      std::free(at);
      size = (wanted + 4095) / 4096 * 4096;
      at = static_cast<char*>(std::aligned_alloc(4096, size));
    }
    return at;
  }
  ~Buffer() { std::free(at); }
};

// Of two words of which `left` inputs are still there.
inline __mmask64 both_of(int64_t left) { return left >= BOTH ? ~0ull : left > 0 ? (1ull << left) - 1 : 0; }

inline int64_t pairs_for(int64_t k) { return (k + BOTH - 1) / BOTH; }

// Of a word of which `left` inputs are still there.
inline __mmask32 lanes_of(int64_t left) { return left >= LANES ? ~0u : left > 0 ? (1u << left) - 1 : 0; }

inline int64_t words_for(int64_t k) { return (k + LANES - 1) / LANES; }
