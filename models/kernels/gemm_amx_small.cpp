// y = x W^T on the tiles of AMX for up to 16 rows of x, in which W passes no further than through the first-level cache.
//
// A tile of W is OUTS outputs by 16 / OUTS words of 32 inputs each, one of x as many words of each row; and of the 16 x 16 sums those
// on which the words agree are wanted. With one to four rows of x four outputs are laid out side by side, so that memory is walked in
// four long lines; with five to sixteen a tile is sixteen outputs by one word. What is multiplied in vain costs nothing, for a
// tile takes its time however full it is. (Chunks as gemm_amx.cpp has them pass through the second level: with a packed W they
// took 1.5 times as long at 4 rows and 1.2 times at 8 and 16.)
//
// Every output is as many chains of additions as a tile has words of it, in either form and in any company that is cut the same way.

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)

#include <cstring>

#include "amx.h"

namespace {

constexpr int64_t RING = 8, AHEAD = 4;  // tiles of W, and how many are laid out before one is multiplied
constexpr int64_t STRIP = 1 << 20;      // bytes of dense W that a thread takes at a time
constexpr int64_t SHARES = 4;           // strips a thread gets at least, so that a slower one is not waited for

// 16 / WORDS rows of x and WORDS words of each from `word` on, as a tile; zeros where there are none.
template <int WORDS>
TILED void pack(const Product& p, int64_t word, char* tile) {
  __m512i r[SIDE];
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) {
    const int64_t row = i / WORDS, input = (word + i % WORDS) * LANES;
    const __mmask32 lanes = row < p.rows ? lanes_of(p.k - input) : 0;
    r[i] = _mm512_maskz_loadu_epi16(lanes, lanes ? p.x + row * p.k + input : p.x);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) _mm512_store_si512(tile + 64 * i, r[i]);
}

// Tiles of W that are laid out at once, for a row is read two words at a time.
constexpr int unit(int outs) { return outs == SIDE ? 2 : 1; }

// The next words of each row of W, of which `left` inputs are there, to a unit of tiles.
template <int OUTS, class Row>
TILED_INLINE void lay(Row (&rows)[OUTS], int64_t left, int64_t apart, int64_t ahead, char* tiles) {
  constexpr int WORDS = SIDE / OUTS;
  for (int word = 0; word < unit(OUTS) * WORDS; word += 2, left -= BOTH)
#pragma GCC unroll 16
    for (int o = 0; o < OUTS; ++o) {
      const Two both = left > 0 ? rows[o].next(both_of(left), apart, ahead) : Two{_mm512_setzero_si512(), _mm512_setzero_si512()};
      const auto place = [&](int at) { return tiles + at / WORDS * TILE + (o * WORDS + at % WORDS) * 64; };
      _mm512_store_si512(place(word), both.first);
      _mm512_store_si512(place(word + 1), both.second);
    }
}

// Sums [4 outputs x 4 words, 4 rows x 4 words] to y, for the outputs from `first` on.
TILED_INLINE void finish_words(const Product& p, const float* sums, int64_t first, int64_t outs) {
  constexpr int PART = 4;
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

// OUTS outputs from `first` on, or as many as there are.
template <int OUTS, class W>
TILED_INLINE void block(const W& w, const Product& p, const char* packed, char* ring, uint8_t* scratch, int64_t first) {
  constexpr int64_t INPUTS = SIDE / OUTS * LANES, UNIT = unit(OUTS);  // inputs in a tile
  const int64_t outs = std::min<int64_t>(OUTS, p.n - first), tiles = parts(p.k, INPUTS), units = parts(tiles, UNIT);
  typename W::Row rows[OUTS];
  for (int64_t o = 0; o < OUTS; ++o) rows[o] = w.open(first + std::min(o, outs - 1));
  const int64_t ahead = w.bytes(first, first + outs), apart = w.unpack(rows[0], w.start(first + outs), 0, scratch);
  auto asking = w.ask(first, first + outs, 2 * tiles);
  for (int64_t row = 0; row < p.rows; ++row) __builtin_prefetch(p.y + row * p.n + first, 1);
  int64_t laid = 0;
  const auto next = [&]() TILED __attribute__((always_inline)) {
    const int64_t left = p.k - laid * UNIT * INPUTS;
    char* const to = ring + laid * UNIT % RING * TILE;
    if (left >= UNIT * INPUTS) lay<OUTS>(rows, UNIT * INPUTS, apart, ahead, to);
    else if (left > 0) lay<OUTS>(rows, left, apart, ahead, to);
    for (int i = 0; i < 2 * UNIT; ++i) asking.step();
    ++laid;
  };
  while (laid * UNIT < AHEAD) next();
  _tile_zero(0);
  for (int64_t unit = 0; unit < units; ++unit) {
    next();
    for (int64_t tile = unit * UNIT; tile < std::min((unit + 1) * UNIT, tiles); ++tile) {
      _tile_loadd(1, ring + tile % RING * TILE, 64);
      _tile_loadd(2, packed + tile * TILE, 64);
      _tile_dpbf16ps(0, 1, 2);
    }
  }
  float* const sums = reinterpret_cast<float*>(ring + RING * TILE);
  _tile_stored(0, sums, 64);
  if constexpr (OUTS == SIDE) finish(p, sums, 0, first);
  else finish_words(p, sums, first, outs);
}

template <int OUTS, class W>
TILED void multiply(const W& w, const Product& p, int threads) {
  constexpr int WORDS = SIDE / OUTS;
  static thread_local Buffer packs;
  if (p.n * p.k < SERIAL) threads = 1;
  const int64_t tiles = parts(p.k, WORDS * LANES);
  const int64_t step = OUTS * std::max<int64_t>(1, std::min(STRIP / (2 * OUTS * p.k), p.n / (OUTS * SHARES * threads)));
  char* const packed = packs.of(tiles * TILE);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    uint8_t* const scratch = reinterpret_cast<uint8_t*>(own.of(unpacked(OUTS * p.k)));
    alignas(64) char ring[(RING + 1) * TILE];
    const Config before = take_tiles();
#pragma omp for
    for (int64_t tile = 0; tile < tiles; ++tile) pack<WORDS>(p, tile * WORDS, packed + tile * TILE);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < p.n; first += step)
      for (int64_t out = first; out < std::min(first + step, p.n); out += OUTS) block<OUTS>(w, p, packed, ring, scratch, out);
    give_back(before);
  }
}

template <class W>
void multiply(const W& w, const Product& p, int threads) {
  if (p.rows <= 4) multiply<4>(w, p, threads);
  else multiply<SIDE>(w, p, threads);
}

}  // namespace

extern "C" {

void dense_gemm_amx_small(const bf16* x, const bf16* weights, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply(Dense{weights, k}, Product{x, bias, y, rows, k, n}, threads);
}

void packed_gemm_amx_small(const bf16* x, const Packed* w, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply(*w, Product{x, bias, y, rows, k, n}, threads);
}
}

#endif
