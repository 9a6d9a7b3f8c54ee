// AMX tiles: their set-up.

#pragma once

#include "tiles.h"

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,avx512vnni,popcnt,amx-tile,amx-bf16")))
#define AMX_INLINE AMX __attribute__((always_inline)) inline

constexpr int64_t TILE_BYTES = 1024;

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
