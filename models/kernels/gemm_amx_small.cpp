// y = x W^T on AMX tiles for up to 16 rows of x. Tiles of W go through a ring in the L1 cache.
//
// A tile of W is OUTPUTS outputs by 16 / OUTPUTS words of 32 inputs each; a tile of x has as many words of each row. Of the 16 x 16
// sums those are used where both words are the same. With one to four rows of x a tile has four outputs, so memory is read in four long
// lines; with five to sixteen it has sixteen outputs and one word. Unused sums cost nothing: a tile takes its time however full it is.
// (Chunks as in gemm_amx.cpp pass through L2: with a packed W 1.5 times as long at 4 rows, 1.2 times at 8 and 16.)
//
// An output is summed in as many parts as a tile has words of it, for either format. Calls with 1 to 4 rows agree bit for bit, and so
// do calls with 5 to 16.

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)

#include <cstring>

#include "amx.h"

namespace {

constexpr int64_t SPLIT_ROWS = 4;                   // rows of x with which an output is summed in four parts
constexpr int64_t RING_TILES = 8, TILES_AHEAD = 4;  // tiles of W in the ring, and how many are laid out before one is multiplied
constexpr int64_t STRIP_BYTES = 1 << 20;            // bytes of dense W that a thread takes at a time
constexpr int64_t MIN_STRIPS_PER_THREAD = 4;        // so that no thread waits long for a slower one

// Packs 16 / WORDS rows of x, WORDS words of each from `word` on, into a tile, padded with zeros.
template <int WORDS>
AMX void pack_x(const Product& p, int64_t word, char* tile) {
  __m512i r[TILE_ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < TILE_ROWS; ++i) {
    const int64_t row = i / WORDS, input = (word + i % WORDS) * BF16_LANES;
    const __mmask32 lanes = row < p.rows ? lane_mask(p.k - input) : 0;
    r[i] = _mm512_maskz_loadu_epi16(lanes, lanes ? p.x + row * p.k + input : p.x);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < TILE_ROWS; ++i) _mm512_store_si512(tile + 64 * i, r[i]);
}

// Tiles of W that are laid out together: rows are read two words at a time.
constexpr int tiles_per_unit(int outs) { return outs == TILE_ROWS ? 2 : 1; }

// Lays out the next words of each row of W as a unit of tiles; `left` inputs remain.
template <int OUTPUTS, class RowReader>
AMX_INLINE void lay_out(RowReader (&rows)[OUTPUTS], int64_t left, int64_t high_offset, int64_t prefetch_bytes, char* tiles) {
  constexpr int WORDS = TILE_ROWS / OUTPUTS;
  for (int word = 0; word < tiles_per_unit(OUTPUTS) * WORDS; word += 2, left -= PAIR_LANES)
#pragma GCC unroll 16
    for (int o = 0; o < OUTPUTS; ++o) {
      const Pair zeros{_mm512_setzero_si512(), _mm512_setzero_si512()};
      const Pair both = left > 0 ? rows[o].next(pair_mask(left), high_offset, prefetch_bytes) : zeros;
      const auto place = [&](int at) { return tiles + at / WORDS * TILE_BYTES + (o * WORDS + at % WORDS) * 64; };
      _mm512_store_si512(place(word), both.first);
      _mm512_store_si512(place(word + 1), both.second);
    }
}

// Adds up the parts of a tile of sums [4 outputs x 4 words, 4 rows x 4 words] and stores the outputs from `first` on to y.
AMX_INLINE void store_split_sums(const Product& p, const float* sums, int64_t first, int64_t outs) {
  constexpr int PART = 4;
  __m512 found = _mm512_setzero_ps();  // [rows, outputs]
  alignas(16) float bias[PART] = {};
#pragma GCC unroll 4
  for (int o = 0; o < PART; ++o) {
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int word = 0; word < PART; ++word) sum = _mm512_mask_loadu_ps(sum, 0x1111 << word, sums + (PART * o + word) * TILE_ROWS);
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
    found = _mm512_mask_add_ps(found, 0x1111 << o, sum, _mm512_permute_ps(sum, 0x4e));
    if (p.bias && o < outs) bias[o] = to_float(p.bias[first + o]);
  }
  alignas(32) bf16 rounded[TILE_ROWS];
  store_floats(rounded, _mm512_add_ps(found, _mm512_broadcast_f32x4(_mm_load_ps(bias))), ALL_LANES);
  for (int64_t row = 0; row < p.rows; ++row) std::memcpy(p.y + row * p.n + first, rounded + row * PART, 2 * outs);
}

// Computes OUTPUTS outputs from `first` on, or as many as there are.
template <int OUTPUTS, class W>
AMX_INLINE void block(const W& w, const Product& p, const char* x_tiles, char* ring, uint8_t* scratch, int64_t first) {
  constexpr int64_t TILE_INPUTS = TILE_ROWS / OUTPUTS * BF16_LANES, UNIT = tiles_per_unit(OUTPUTS);
  const int64_t outs = std::min<int64_t>(OUTPUTS, p.n - first), tiles = ceil_div(p.k, TILE_INPUTS), units = ceil_div(tiles, UNIT);
  typename W::RowReader rows[OUTPUTS];
  for (int64_t o = 0; o < OUTPUTS; ++o) rows[o] = w.reader(first + std::min(o, outs - 1));
  const int64_t prefetch_bytes = w.bytes(first, first + outs);
  const int64_t high_offset = w.decode_high_bytes(rows[0], w.start(first + outs), 0, scratch);
  auto prefetcher = w.prefetcher(first, first + outs, 2 * tiles);
  for (int64_t row = 0; row < p.rows; ++row) __builtin_prefetch(p.y + row * p.n + first, 1);
  int64_t laid = 0;
  const auto next = [&]() AMX __attribute__((always_inline)) {
    const int64_t left = p.k - laid * UNIT * TILE_INPUTS;
    char* const to = ring + laid * UNIT % RING_TILES * TILE_BYTES;
    if (left >= UNIT * TILE_INPUTS) lay_out<OUTPUTS>(rows, UNIT * TILE_INPUTS, high_offset, prefetch_bytes, to);
    else if (left > 0) lay_out<OUTPUTS>(rows, left, high_offset, prefetch_bytes, to);
    for (int i = 0; i < 2 * UNIT; ++i) prefetcher.step();
    ++laid;
  };
  while (laid * UNIT < TILES_AHEAD) next();
  _tile_zero(0);
  for (int64_t unit = 0; unit < units; ++unit) {
    next();
    for (int64_t tile = unit * UNIT; tile < std::min((unit + 1) * UNIT, tiles); ++tile) {
      _tile_loadd(1, ring + tile % RING_TILES * TILE_BYTES, 64);
      _tile_loadd(2, x_tiles + tile * TILE_BYTES, 64);
      _tile_dpbf16ps(0, 1, 2);
    }
  }
  float* const sums = reinterpret_cast<float*>(ring + RING_TILES * TILE_BYTES);
  _tile_stored(0, sums, 64);
  if constexpr (OUTPUTS == TILE_ROWS) store_sums(p, sums, 0, first);
  else store_split_sums(p, sums, first, outs);
}

template <int OUTPUTS, class W>
AMX void multiply(const W& w, const Product& p, int threads) {
  constexpr int WORDS = TILE_ROWS / OUTPUTS;
  static thread_local Buffer packs;
  if (p.n * p.k < MIN_PARALLEL_WORK) threads = 1;
  const int64_t tiles = ceil_div(p.k, WORDS * BF16_LANES);
  const int64_t most = p.n / (OUTPUTS * MIN_STRIPS_PER_THREAD * threads);
  const int64_t step = OUTPUTS * std::max<int64_t>(1, std::min(STRIP_BYTES / (2 * OUTPUTS * p.k), most));
  char* const x_tiles = packs.reserve(tiles * TILE_BYTES);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    uint8_t* const scratch = reinterpret_cast<uint8_t*>(own.reserve(decoded_bytes(OUTPUTS * p.k)));
    alignas(64) char ring[(RING_TILES + 1) * TILE_BYTES];
    const TileConfig before = configure_tiles();
#pragma omp for
    for (int64_t tile = 0; tile < tiles; ++tile) pack_x<WORDS>(p, tile * WORDS, x_tiles + tile * TILE_BYTES);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < p.n; first += step)
      for (int64_t out = first; out < std::min(first + step, p.n); out += OUTPUTS) block<OUTPUTS>(w, p, x_tiles, ring, scratch, out);
    restore_tiles(before);
  }
}

template <class W>
void multiply(const W& w, const Product& p, int threads) {
  if (p.rows <= SPLIT_ROWS) multiply<4>(w, p, threads);
  else multiply<TILE_ROWS>(w, p, threads);
}

}  // namespace

extern "C" {

void dense_gemm_amx_small(const bf16* x, const bf16* weights, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n,
                          int threads) {
  multiply(Dense{weights, k}, Product{x, bias, y, rows, k, n}, threads);
}

void packed_gemm_amx_small(const bf16* x, const Packed* w, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n,
                           int threads) {
  multiply(*w, Product{x, bias, y, rows, k, n}, threads);
}
}

#endif
