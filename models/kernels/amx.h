// Tiles of AMX: how they are set up, and what is shuffled into them.

#pragma once

#include "weights.h"

#define TILED __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,popcnt,amx-tile,amx-bf16")))
#define TILED_INLINE TILED __attribute__((always_inline)) inline

constexpr int64_t SIDE = 16, TILE = 1024;  // rows of a tile and its bytes

inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

struct alignas(64) Config {
  uint8_t palette = 0, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sets up eight whole tiles in this thread; returns what was set up before, which torch's own products may rely on.
TILED_INLINE Config take_tiles() {
  Config before, ours;
  ours.palette = 1;
  for (int tile = 0; tile < 8; ++tile) ours.bytes[tile] = 64, ours.rows[tile] = SIDE;
  _tile_storeconfig(&before);
  _tile_loadconfig(&ours);
  return before;
}

TILED_INLINE void give_back(const Config& before) {
  if (before.palette) _tile_loadconfig(&before);
  else _tile_release();
}

// 16 x 16 values of 32 bits, in four steps that each merge what is twice as far apart.
TILED_INLINE void transpose(__m512i r[SIDE]) {
  __m512i t[SIDE];
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

// A tile of sums [outputs, rows] to y.
TILED inline void finish(const Product& p, const float* sums, int64_t row, int64_t out) {
  const int64_t rows = std::min(SIDE, p.rows - row);
  const __mmask16 lanes = p.n - out >= SIDE ? 0xffff : (1u << (p.n - out)) - 1;
  const __m512 bias = p.bias ? widen_all(p.bias + out, lanes) : _mm512_setzero_ps();
  __m512i r[SIDE];
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) r[i] = _mm512_load_si512(sums + SIDE * i);
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i)
    if (i < rows) narrow_all(p.y + (row + i) * p.n + out, _mm512_add_ps(_mm512_castsi512_ps(r[i]), bias), lanes);
}
