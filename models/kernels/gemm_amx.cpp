// y = x W^T on AMX tiles for any number of rows (gemm_amx_small.cpp is faster up to 16). W is dense as torch holds it, or packed.
//
// A tile of W is 16 outputs by 32 inputs, a tile of x 16 rows by 32 inputs in pairs; one instruction adds their product to 16 x 16
// sums. How the tiles are fed:
// - W is laid out as tiles chunk by chunk, and a packed one expanded: the next chunk while this one is multiplied, in other units of
//   the core. So a packed W costs fewer bytes and hardly any time.
// - Few rows of x, which stay in cache: a chunk is a few outputs and all inputs, four rows of W side by side. Memory is read in long
//   lines, and sums never leave their tiles. (Chunks of 256 inputs took up to 1.5 times as long at 16 to 64 rows.)
// - Many rows of x: a chunk is many outputs and so few inputs that four tiles of it fit an L1 cache of 48 KB. Sums wait in L2. (Chunks
//   of 512 inputs took 1.15 times as long.)
//
// Each output is summed in the order of its inputs, for either format and any number of rows.

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "amx.h"

namespace {

constexpr int64_t BLOCK = 2 * TILE_ROWS;               // outputs, and rows of x, of four tiles of sums
constexpr int64_t TILE_SUMS = TILE_ROWS * TILE_ROWS;   // in one tile
constexpr int64_t FEW_ROWS = 256;                      // rows of x up to which reading W is what takes long
constexpr int64_t FEW_ROWS_VALUES = 560 << 10;         // values of x that fit an L2 cache of 2 MB beside chunks of W
constexpr int64_t MAX_ROWS = 640;                      // rows of x whose sums fit an L2 cache of 2 MB
constexpr int64_t CHUNK_OUTPUTS = 192;                 // outputs in a chunk; BLOCK for few rows
constexpr int64_t CHUNK_TILES = 8;                     // tiles of inputs in a chunk; all of them for few rows
constexpr int64_t ROW_GROUP = 4, PIECE_TILES = 8;      // a piece of a chunk: rows of W side by side, by tiles of inputs
constexpr int64_t PREFETCH_BYTES = 320;                // about as far as a row's part of the next chunk
constexpr int64_t PREFETCH_LINES = 4;                  // cache lines of x to prefetch beside each product
constexpr int64_t MIN_STRIPS_PER_THREAD = 8;           // so that no thread waits long for a slower one
constexpr int64_t ALL = INT64_MAX;

// Packs 16 rows of x, 32 inputs of each, into a tile, padded with zeros.
AMX void pack_x(const Product& p, int64_t row, int64_t input, char* tile) {
  const __mmask32 lanes = lane_mask(p.k - input);
  __m512i r[TILE_ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < TILE_ROWS; ++i) {
    const bool there = row + i < p.rows;
    r[i] = _mm512_maskz_loadu_epi16(there ? lanes : 0, p.x + (there ? row + i : 0) * p.k + input);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < TILE_ROWS; ++i) _mm512_store_si512(tile + 64 * i, r[i]);
}

// Lays out a chunk of W as tiles [outputs / 16, chunk_tiles, 16, 32], piece after piece.
template <class W>
struct ChunkLayout {
  const W& w;
  typename W::RowReader* rows;  // [outs], rounded up to whole groups
  int64_t outs, inputs, chunk_tiles, prefetch_bytes;
  char* tiles;
  uint8_t* scratch;  // for a group's high bytes
  int64_t row = 0, word = 0;
  int64_t high_offset[ROW_GROUP] = {};

  AMX_INLINE void step(int64_t pieces) {
    for (; pieces > 0 && row < outs; --pieces) {
      typename W::RowReader r[ROW_GROUP];
      for (int g = 0; g < ROW_GROUP; ++g) {
        r[g] = rows[row + g];
        if (word == 0)
          high_offset[g] = w.decode_high_bytes(r[g], w.end(r[g], pair_count(inputs)), prefetch_bytes / 2,
                                               scratch + g * decoded_bytes(inputs));
      }
      char* to = tiles + (row / TILE_ROWS * chunk_tiles + word) * TILE_BYTES + row % TILE_ROWS * 64;
      const int64_t left = inputs - word * BF16_LANES;
      if (left >= PIECE_TILES * BF16_LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < PIECE_TILES; i += 2)
#pragma GCC unroll 4
          for (int g = 0; g < ROW_GROUP; ++g) {
            const Pair both = r[g].next(~0ull, high_offset[g], prefetch_bytes);
            _mm512_store_si512(to + i * TILE_BYTES + g * 64, both.first);
            _mm512_store_si512(to + (i + 1) * TILE_BYTES + g * 64, both.second);
          }
      } else {
        for (int64_t i = 0; i * BF16_LANES < left; i += 2)
          for (int g = 0; g < ROW_GROUP; ++g) {
            const Pair both = r[g].next(pair_mask(left - i * BF16_LANES), high_offset[g], prefetch_bytes);
            _mm512_store_si512(to + i * TILE_BYTES + g * 64, both.first);
            if ((i + 1) * BF16_LANES < left) _mm512_store_si512(to + (i + 1) * TILE_BYTES + g * 64, both.second);
          }
      }
      for (int g = 0; g < ROW_GROUP; ++g) rows[row + g] = r[g];
      word += PIECE_TILES;
      if (word * BF16_LANES >= inputs) word = 0, row += ROW_GROUP;
    }
  }
};

// What overlaps with a product: laying out pieces of the next chunk, and prefetching x.
template <class W>
struct Overlap {
  ChunkLayout<W>& next;
  int64_t pieces, lines;
  const char* x;

  AMX_INLINE void step() {
    for (int64_t i = 0; i < lines; ++i, x += 64) _mm_prefetch(x, _MM_HINT_T1);
    next.step(pieces);
  }
};

// Adds the products of T tiles of outputs and R tiles of rows over `input_tiles` to sums in memory, or to zero.
// The second tile of outputs lies chunk_tiles after the first, the second tile of rows input_tiles after the first.
template <int T, int R, class B>
AMX_INLINE void product(const char* w, const char* x, int64_t chunk_tiles, int64_t input_tiles, float* sums, bool zero, B overlap) {
  if (zero) {
    _tile_zero(0);
    if (T > 1) _tile_zero(1);
    if (R > 1) _tile_zero(2);
    if (T > 1 && R > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    if (T > 1) _tile_loadd(1, sums + TILE_SUMS, 64);
    if (R > 1) _tile_loadd(2, sums + 2 * TILE_SUMS, 64);
    if (T > 1 && R > 1) _tile_loadd(3, sums + 3 * TILE_SUMS, 64);
  }
  for (int64_t i = 0; i < input_tiles; ++i, w += TILE_BYTES, x += TILE_BYTES) {
    _tile_loadd(4, w, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (T > 1) _tile_loadd(5, w + chunk_tiles * TILE_BYTES, 64);
    if (T > 1) _tile_dpbf16ps(1, 5, 6);
    if (R > 1) _tile_loadd(7, x + input_tiles * TILE_BYTES, 64);
    if (R > 1) _tile_dpbf16ps(2, 4, 7);
    if (T > 1 && R > 1) _tile_dpbf16ps(3, 5, 7);
    overlap.step();
  }
  _tile_stored(0, sums, 64);
  if (T > 1) _tile_stored(1, sums + TILE_SUMS, 64);
  if (R > 1) _tile_stored(2, sums + 2 * TILE_SUMS, 64);
  if (T > 1 && R > 1) _tile_stored(3, sums + 3 * TILE_SUMS, 64);
}

// Sizes of a product's blocks.
struct Blocking {
  int64_t outs, chunk_tiles;       // a chunk: outputs by tiles of inputs
  int64_t input_tiles, row_tiles;  // tiles of all inputs, and of all rows of x
  bool few_rows;                   // one chunk has all inputs, and sums stay in their tiles

  explicit Blocking(const Product& p) {
    input_tiles = word_count(p.k);
    row_tiles = ceil_div(p.rows, TILE_ROWS);
    few_rows = p.rows <= FEW_ROWS && p.rows * p.k <= FEW_ROWS_VALUES;
    outs = few_rows ? BLOCK : CHUNK_OUTPUTS;
    chunk_tiles = few_rows ? input_tiles : CHUNK_TILES;
  }
  int64_t chunk_bytes() const { return outs * chunk_tiles * 64; }
  int64_t sum_bytes() const { return ceil_div(row_tiles, 2) * BLOCK * outs * 4; }
  int64_t x_offset(int64_t tile, int64_t row) const {  // of x's tiles, for the chunk at `tile` and a tile of rows
    return (tile * row_tiles + row * std::min(chunk_tiles, input_tiles - tile)) * TILE_BYTES;
  }
};

// Computes outputs [first, last): block after block of outputs, and chunk after chunk of inputs.
template <class W>
AMX void strip(const W& w, const Product& p, const Blocking& blk, const char* x_tiles, int64_t first, int64_t last, char* scratch) {
  const int64_t chunks = ceil_div(blk.input_tiles, blk.chunk_tiles), steps = ceil_div(last - first, blk.outs) * chunks;
  typename W::RowReader rows[2][CHUNK_OUTPUTS + ROW_GROUP];
  float* const sums = reinterpret_cast<float*>(scratch + 2 * blk.chunk_bytes());
  uint8_t* const high_bytes = reinterpret_cast<uint8_t*>(scratch + 2 * blk.chunk_bytes() + blk.sum_bytes());

  const auto layout = [&](int64_t step) {
    const int64_t from = first + step / chunks * blk.outs, tile = step % chunks * blk.chunk_tiles;
    const int64_t outs = step < steps ? std::min(blk.outs, last - from) : 0;
    typename W::RowReader* here = rows[step / chunks % 2];
    for (int64_t o = 0; tile == 0 && o < ceil_div(outs, ROW_GROUP) * ROW_GROUP; ++o) {
      here[o] = w.reader(std::min(from + o, last - 1));
    }
    const int64_t inputs = std::min(blk.chunk_tiles * BF16_LANES, p.k - tile * BF16_LANES);
    const int64_t prefetch_bytes =
        !blk.few_rows ? PREFETCH_BYTES : outs <= 0 ? 0 : w.bytes(from, from + outs) / ceil_div(outs, ROW_GROUP);
    return ChunkLayout<W>{w, here, outs, inputs, blk.chunk_tiles, prefetch_bytes, scratch + step % 2 * blk.chunk_bytes(), high_bytes};
  };

  layout(0).step(ALL);
  for (int64_t step = 0; step < steps; ++step) {
    ChunkLayout<W> next = layout(step + 1);
    const int64_t from = first + step / chunks * blk.outs, tile = step % chunks * blk.chunk_tiles;
    const int64_t outs = std::min(blk.outs, last - from), input_tiles = std::min(blk.chunk_tiles, blk.input_tiles - tile);
    const int64_t products = ceil_div(blk.row_tiles, 2) * ceil_div(outs, BLOCK) * input_tiles;
    const int64_t pieces = ceil_div(ceil_div(blk.outs, ROW_GROUP) * ceil_div(blk.chunk_tiles, PIECE_TILES), products);
    float* c = sums;
    for (int64_t m = 0; m < blk.row_tiles; m += 2)
      for (int64_t o = 0; o < outs; o += BLOCK, c += 4 * TILE_SUMS) {
        const char* a = scratch + step % 2 * blk.chunk_bytes() + o * blk.chunk_tiles * 64;
        const char* b = x_tiles + blk.x_offset(tile, m);
        const bool two = o + TILE_ROWS < outs, high = m + 1 < blk.row_tiles;
        const Overlap<W> overlap{next, pieces, blk.few_rows ? 0 : PREFETCH_LINES,
                                 b + (2 + 2 * o / blk.outs) * input_tiles * TILE_BYTES};
        if (two && high) product<2, 2>(a, b, blk.chunk_tiles, input_tiles, c, tile == 0, overlap);
        else if (two) product<2, 1>(a, b, blk.chunk_tiles, input_tiles, c, tile == 0, overlap);
        else if (high) product<1, 2>(a, b, blk.chunk_tiles, input_tiles, c, tile == 0, overlap);
        else product<1, 1>(a, b, blk.chunk_tiles, input_tiles, c, tile == 0, overlap);
        if (tile + input_tiles < blk.input_tiles) continue;
        for (int i = 0; i < 4; ++i)
          if ((two || i % 2 == 0) && (high || i < 2))
            store_sums(p, c + i * TILE_SUMS, (m + i / 2) * TILE_ROWS, from + o + i % 2 * TILE_ROWS);
      }
    next.step(ALL);
  }
}

template <class W>
AMX void multiply(const W& w, const Product& p, int threads) {
  static thread_local Buffer packs;
  const Blocking blk(p);
  if (p.n * p.k < MIN_PARALLEL_WORK) threads = 1;
  const int64_t step = std::max<int64_t>(1, p.n / blk.outs / (MIN_STRIPS_PER_THREAD * threads)) * blk.outs;
  char* const x_tiles = packs.reserve(blk.row_tiles * blk.input_tiles * TILE_BYTES);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    char* const scratch = own.reserve(2 * blk.chunk_bytes() + blk.sum_bytes() + ROW_GROUP * decoded_bytes(p.k));
    const TileConfig before = configure_tiles();
#pragma omp for collapse(2)
    for (int64_t m = 0; m < blk.row_tiles; ++m)
      for (int64_t i = 0; i < blk.input_tiles; ++i) {
        const int64_t tile = i / blk.chunk_tiles * blk.chunk_tiles;
        pack_x(p, m * TILE_ROWS, i * BF16_LANES, x_tiles + blk.x_offset(tile, m) + (i - tile) * TILE_BYTES);
      }
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < p.n; first += step)
      strip(w, p, blk, x_tiles, first, std::min(first + step, p.n), scratch);
    restore_tiles(before);
  }
}

// Takes so many rows at a time that their sums fit the cache, as evenly as tiles allow.
template <class W>
void multiply_all(const W& w, Product p, int threads) {
  const int64_t all = p.rows, some = ceil_div(ceil_div(all, ceil_div(all, MAX_ROWS)), BLOCK) * BLOCK;
  for (int64_t row = 0; row < all; row += some, p.x += some * p.k, p.y += some * p.n) {
    p.rows = std::min(some, all - row);
    multiply(w, p, threads);
  }
}

}  // namespace

extern "C" {

// Whether the processor has AMX and the operating system lets this process use it.
int amx_supported() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

void dense_gemm_amx(const bf16* x, const bf16* weights, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply_all(Dense{weights, k}, Product{x, bias, y, rows, k, n}, threads);
}

void packed_gemm_amx(const bf16* x, const Packed* w, const bf16* bias, bf16* y, int64_t rows, int64_t k, int64_t n, int threads) {
  multiply_all(*w, Product{x, bias, y, rows, k, n}, threads);
}
}

#else

extern "C" int amx_supported() { return 0; }

#endif
