// What is multiplied, and how a weight is read: 32 values at a time, dense as torch holds them or compressed to the non-zeros.

#pragma once

#include <cstdint>

#include "floats.h"

constexpr int64_t LANES = 32;         // weights a register holds
constexpr int64_t SERIAL = 64 << 10;  // weights below which waking other threads costs more than they save

struct Product {
  const bf16* x;     // [rows, k]
  const bf16* bias;  // [n], or null
  bf16* y;           // [rows, n]
  int64_t rows, k, n;
};

// Each load asks for what lies `ahead` bytes behind it, which will be read soon.

struct Dense {
  const bf16* weights;  // [n, k]
  int64_t k;

  struct Row {
    const bf16* at;
    int64_t ahead;

    WIDE_INLINE __m512i next(__mmask32 lanes) {
      const __m512i w = _mm512_maskz_loadu_epi16(lanes, at);
      _mm_prefetch(reinterpret_cast<const char*>(at) + ahead, _MM_HINT_T1);
      at += LANES;
      return w;
    }
  };

  Row row(int64_t o, int64_t ahead) const { return {weights + o * k, ahead}; }
  int64_t bytes(int64_t first, int64_t last) const { return (last - first) * k * 2; }
};

struct Sparse {
  const bf16* values;      // the non-zeros of each row, one row after another, and LANES more that may be read
  const uint32_t* masks;   // [n, words], bit i of word j for weight 32 j + i; none set beyond k
  const int64_t* offsets;  // [n + 1], where each row's values start
  int64_t words;

  struct Row {
    const bf16* at;
    const uint32_t* mask;
    int64_t ahead;

    WIDE_INLINE __m512i next(__mmask32) {
      const __m512i w = _mm512_maskz_expand_epi16(*mask, _mm512_loadu_si512(at));
      _mm_prefetch(reinterpret_cast<const char*>(at) + ahead, _MM_HINT_T1);
      at += __builtin_popcount(*mask++);
      return w;
    }
  };

  Row row(int64_t o, int64_t ahead) const { return {values + offsets[o], masks + o * words, ahead}; }
  int64_t bytes(int64_t first, int64_t last) const { return (offsets[last] - offsets[first]) * 2; }
};

// Of a word of which `left` inputs are still there.
inline __mmask32 lanes_of(int64_t left) { return left >= LANES ? ~0u : left > 0 ? (1u << left) - 1 : 0; }

inline int64_t words_for(int64_t k) { return (k + LANES - 1) / LANES; }
