// Tiles of 16 by 16 sums, outputs by rows of x: turned round, and stored to y.

#pragma once

#include "weights.h"

constexpr int64_t TILE_ROWS = 16;

inline int64_t ceil_div(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Transposes 16 x 16 values of 32 bits in four steps.
AVX512_INLINE void transpose(__m512i r[TILE_ROWS]) {
  __m512i t[TILE_ROWS];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int from = i % 4 + i / 4 * 8;
    t[from] = _mm512_shuffle_i32x4(r[from], r[from + 4], 0x88);
    t[from + 4] = _mm512_shuffle_i32x4(r[from], r[from + 4], 0xdd);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Adds the bias to a tile of sums [outputs, rows] and stores it to y.
AVX512_INLINE void store_sums(const Product& p, const float* sums, int64_t row, int64_t out) {
  const int64_t rows = std::min(TILE_ROWS, p.rows - row);
  const __mmask16 lanes = p.n - out >= TILE_ROWS ? 0xffff : (1u << (p.n - out)) - 1;
  const __m512 bias = p.bias ? load_floats(p.bias + out, lanes) : _mm512_setzero_ps();
  __m512i r[TILE_ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < TILE_ROWS; ++i) r[i] = _mm512_load_si512(sums + TILE_ROWS * i);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < TILE_ROWS; ++i)
    if (i < rows) store_floats(p.y + (row + i) * p.n + out, _mm512_add_ps(_mm512_castsi512_ps(r[i]), bias), lanes);
}
