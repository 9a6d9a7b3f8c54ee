// y = x W^T on the tiles of AMX for up to 4 rows of x, which would leave most of a tile's 16 columns empty if a column were a row.
//
// So a column is a part of a row: a tile of W is 4 outputs by 4 words of 32 inputs each, one of x 4 rows by the same words, and of the
// 16 x 16 sums those on which the words agree are wanted. What is multiplied in vain costs nothing, for a tile takes its time
// however full it is; and four outputs are laid out at once, where sixteen would be needed otherwise. Their words go through a ring
// of tiles in the first-level cache, and memory is walked in four long lines.
// (Chunks of 32 whole rows of W, as tiles.cpp has them, pass through the second level: with a compressed W 1.2 times as long at 4
// rows. The same with 8 outputs by 2 words for 8 rows of x was no faster than those chunks.)
//
// Every output is four chains of additions, one for every fourth word, in either form and in any company of up to 4 rows.

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)

#include <cstring>

#include "amx.h"

namespace {

constexpr int PART = 4;                 // rows of x, outputs, and words of each in a tile
constexpr int64_t RING = 8, AHEAD = 4;  // tiles of W, and how many are laid out before one is multiplied
constexpr int64_t STRIP = 1 << 20;      // bytes of dense W that a thread takes at a time
constexpr int64_t SHARES = 4;           // strips a thread gets at least, so that a slower one is not waited for

// Four rows of x and four words of each, as a tile; zeros where there are none.
TILED void pack(const Product& p, int64_t word, char* tile) {
  __m512i r[SIDE];
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) {
    const int64_t row = i / PART, input = (word + i % PART) * LANES;
    const __mmask32 lanes = row < p.rows ? lanes_of(p.k - input) : 0;
    r[i] = _mm512_maskz_loadu_epi16(lanes, lanes ? p.x + row * p.k + input : p.x);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) _mm512_store_si512(tile + 64 * i, r[i]);
}

// The next four words of each of four rows of W, of which `left` inputs are there.
template <class Row>
TILED_INLINE void lay(Row (&rows)[PART], int64_t left, char* tile) {
  if (left >= PART * LANES) {
#pragma GCC unroll 4
    for (int word = 0; word < PART; ++word)
#pragma GCC unroll 4
      for (int o = 0; o < PART; ++o) _mm512_store_si512(tile + (PART * o + word) * 64, rows[o].next(~0u));
    return;
  }
  for (int word = 0; word < PART; ++word, left -= LANES)
    for (int o = 0; o < PART; ++o) {
      const __mmask32 lanes = lanes_of(left);
      _mm512_store_si512(tile + (PART * o + word) * 64, lanes ? rows[o].next(lanes) : _mm512_setzero_si512());
    }
}

// Sums [4 outputs x 4 words, 4 rows x 4 words] to y, for the outputs from `first` on.
TILED_INLINE void finish(const Product& p, const float* sums, int64_t first, int64_t outs) {
  __m512 found = _mm512_setzero_ps();  // [rows, outputs]
  alignas(16) float bias[PART] = {};
#pragma GCC unroll 4
  for (int o = 0; o < PART; ++o) {
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int word = 0; word < PART; ++word) sum = _mm512_mask_loadu_ps(sum, 0x1111 << word, sums + (PART * o + word) * SIDE);
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
    found = _mm512_mask_add_ps(found, 0x1111 << o, sum, _mm512_permute_ps(sum, 0x4e));
    if (p.bias && o < outs) bias[o] = widen(p.bias[first + o]);
  }
  alignas(32) bf16 narrowed[SIDE];
  narrow_all(narrowed, _mm512_add_ps(found, _mm512_broadcast_f32x4(_mm_load_ps(bias))), WHOLE);
  for (int64_t row = 0; row < p.rows; ++row) std::memcpy(p.y + row * p.n + first, narrowed + row * PART, 2 * outs);
}

// Four outputs from `first` on, or as many as there are.
template <class W>
TILED_INLINE void block(const W& w, const Product& p, const char* packed, char* ring, int64_t first) {
  const int64_t outs = std::min<int64_t>(PART, p.n - first), tiles = parts(p.k, PART * LANES);
  typename W::Row rows[PART];
  for (int64_t o = 0; o < PART; ++o) rows[o] = w.row(first + std::min(o, outs - 1), w.bytes(first, first + outs));
  for (int64_t row = 0; row < p.rows; ++row) __builtin_prefetch(p.y + row * p.n + first, 1);
  int64_t laid = 0;
  const auto next = [&]() TILED __attribute__((always_inline)) {
    if (laid < tiles) lay(rows, p.k - laid * PART * LANES, ring + laid % RING * TILE);
    ++laid;
  };
  while (laid < AHEAD) next();
  _tile_zero(0);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    next();
    _tile_loadd(1, ring + tile % RING * TILE, 64);
    _tile_loadd(2, packed + tile * TILE, 64);
    _tile_dpbf16ps(0, 1, 2);
  }
  float* const sums = reinterpret_cast<float*>(ring + RING * TILE);
  _tile_stored(0, sums, 64);
  finish(p, sums, first, outs);
}

template <class W>
TILED void multiply(const W& w, const Product& p, int threads) {
  static thread_local Buffer packs;
  if (p.n * p.k < SERIAL) threads = 1;
  const int64_t tiles = parts(p.k, PART * LANES);
  const int64_t step = PART * std::max<int64_t>(1, std::min(STRIP / (2 * PART * p.k), p.n / (PART * SHARES * threads)));
  char* const packed = packs.of(tiles * TILE);
#pragma omp parallel num_threads(threads)
  {
    alignas(64) char ring[(RING + 1) * TILE];
    const Config before = take_tiles();
#pragma omp for
    for (int64_t tile = 0; tile < tiles; ++tile) pack(p, tile * PART, packed + tile * TILE);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < p.n; first += step)
      for (int64_t out = first; out < std::min(first + step, p.n); out += PART) block(w, p, packed, ring, out);
    give_back(before);
  }
}

}  // namespace

extern "C" {

void dense_few_tiles(const bf16* x, const bf16* weights, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply(Dense{weights, k}, Product{x, bias, y, rows, k, n}, threads);
}

void sparse_few_tiles(const bf16* x, const bf16* values, const uint32_t* masks, const int64_t* offsets, const bf16* bias, bf16* y,
                      int64_t rows, int64_t k, int64_t n, int threads) {
  multiply(Sparse{values, masks, offsets, words_for(k)}, Product{x, bias, y, rows, k, n}, threads);
}
}

#endif
