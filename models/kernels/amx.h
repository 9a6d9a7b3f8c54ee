// AMX tiles: their set-up, and the shuffles before and after.

#pragma once

#include "weights.h"

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,popcnt,amx-tile,amx-bf16")))
#define AMX_INLINE AMX __attribute__((always_inline)) inline

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 1024;

inline int64_t ceil_div(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

struct alignas(64) TileConfig {
  uint8_t palette = 0, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sets up eight full tiles in this thread. Returns the previous set-up, which torch's own products may rely on.
AMX_INLINE TileConfig configure_tiles() {
  TileConfig before, ours;
  ours.palette = 1;
  for (int tile = 0; tile < 8; ++tile) ours.bytes[tile] = 64, ours.rows[tile] = TILE_ROWS;
  _tile_storeconfig(&before);
  _tile_loadconfig(&ours);
  return before;
}

AMX_INLINE void restore_tiles(const TileConfig& before) {
  if (before.palette) _tile_loadconfig(&before);
  else _tile_release();
}

// Transposes 16 x 16 values of 32 bits in four steps.
AMX_INLINE void transpose(__m512i r[TILE_ROWS]) {
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
AMX inline void store_sums(const Product& p, const float* sums, int64_t row, int64_t out) {
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
