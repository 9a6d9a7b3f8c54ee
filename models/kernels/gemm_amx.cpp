// y = x W^T on the tiles of AMX, for any number of rows (for up to sixteen see gemm_amx_small.cpp): W dense as torch holds it, or packed.
//
// A tile of W is 16 outputs by 32 inputs as they lie, a tile of x 16 rows by 32 inputs with pair under pair, and one instruction
// adds their product to 16 x 16 sums. What keeps the tiles fed:
// - W is laid out as tiles chunk by chunk, where a packed one is expanded, and the next chunk while this one is multiplied:
//   the two use different units. So a packed W costs fewer bytes and hardly any time.
// - Few rows, all of which stay in cache, take chunks of few outputs and all inputs, four rows of W side by side: memory is walked in
//   long lines, and sums never leave their tiles. (Chunks of 256 inputs took up to 1.5 times as long at 16 to 64 rows.)
// - Many rows take chunks of many outputs and so few inputs that four tiles' worth stay in a first-level cache of 48 KB; sums
//   rest in the second level meanwhile. (Chunks of 512 inputs took 1.15 times as long.)
//
// Every output is one chain of additions in the order of its inputs, in either form and with any number of rows.

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "amx.h"

namespace {

constexpr int64_t PAIR = 2 * SIDE;         // outputs, and rows of x, of four tiles of sums
constexpr int64_t SUMS = SIDE * SIDE;      // of one tile
constexpr int64_t FEW = 256;               // rows of x for which W's arrival takes long
constexpr int64_t FITS = 560 << 10;        // values of x that stay in a second-level cache of 2 MB beside chunks of W
constexpr int64_t MOST = 640;              // rows of x whose sums stay in a second-level cache of 2 MB
constexpr int64_t OUTS = 192;              // outputs in a chunk for more rows than few, PAIR for those
constexpr int64_t DEEP = 8;                // tiles of inputs in a chunk for more rows than few, all for those
constexpr int64_t GROUP = 4, PIECE = 8;    // rows of W that are laid out side by side, and how many tiles of inputs at once
constexpr int64_t NEXT = 320;              // bytes from a row's part in a chunk to the one in the next, about
constexpr int64_t LINES = 4;               // cache lines of x that are asked for beside each product
constexpr int64_t SHARES = 8;              // strips a thread gets at least, so that a slower one is not waited for
constexpr int64_t ALL = INT64_MAX;

// 16 rows of x and 32 inputs of each, as a tile; zeros where there are none.
TILED void pack(const Product& p, int64_t row, int64_t input, char* tile) {
  const __mmask32 lanes = lanes_of(p.k - input);
  __m512i r[SIDE];
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) {
    const bool there = row + i < p.rows;
    r[i] = _mm512_maskz_loadu_epi16(there ? lanes : 0, p.x + (there ? row + i : 0) * p.k + input);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) _mm512_store_si512(tile + 64 * i, r[i]);
}

// Lays out a chunk of W as tiles, piece after piece: [outputs / 16, deep, 16, 32].
template <class W>
struct Layout {
  const W& w;
  typename W::Row* rows;  // [outs], and as many more as fill a group
  int64_t outs, inputs, deep, ahead;
  char* tiles;
  uint8_t* scratch;  // for what of a group is unpacked
  int64_t row = 0, word = 0;
  int64_t apart[GROUP] = {};

  TILED_INLINE void step(int64_t pieces) {
    for (; pieces > 0 && row < outs; --pieces) {
      typename W::Row r[GROUP];
      for (int g = 0; g < GROUP; ++g) {
        r[g] = rows[row + g];
        if (word == 0) apart[g] = w.unpack(r[g], w.end(r[g], pairs_for(inputs)), ahead / 2, scratch + g * unpacked(inputs));
      }
      char* to = tiles + (row / SIDE * deep + word) * TILE + row % SIDE * 64;
      const int64_t left = inputs - word * LANES;
      if (left >= PIECE * LANES) {
#pragma GCC unroll 4
        for (int i = 0; i < PIECE; i += 2)
#pragma GCC unroll 4
          for (int g = 0; g < GROUP; ++g) {
            const Two both = r[g].next(~0ull, apart[g], ahead);
            _mm512_store_si512(to + i * TILE + g * 64, both.first);
            _mm512_store_si512(to + (i + 1) * TILE + g * 64, both.second);
          }
      } else {
        for (int64_t i = 0; i * LANES < left; i += 2)
          for (int g = 0; g < GROUP; ++g) {
            const Two both = r[g].next(both_of(left - i * LANES), apart[g], ahead);
            _mm512_store_si512(to + i * TILE + g * 64, both.first);
            if ((i + 1) * LANES < left) _mm512_store_si512(to + (i + 1) * TILE + g * 64, both.second);
          }
      }
      for (int g = 0; g < GROUP; ++g) rows[row + g] = r[g];
      word += PIECE;
      if (word * LANES >= inputs) word = 0, row += GROUP;
    }
  }
};

// What goes on beside a product: pieces of the next chunk are laid out, and lines of x asked for.
template <class W>
struct Beside {
  Layout<W>& next;
  int64_t pieces, lines;
  const char* x;

  TILED_INLINE void step() {
    for (int64_t i = 0; i < lines; ++i, x += 64) _mm_prefetch(x, _MM_HINT_T1);
    next.step(pieces);
  }
};

// T tiles of outputs times R tiles of rows: `depth` tiles of inputs more, for sums that are at zero or were left in memory.
// The second tile of outputs is `deep` tiles behind the first, that of rows `depth`.
template <int T, int R, class B>
TILED_INLINE void product(const char* w, const char* x, int64_t deep, int64_t depth, float* sums, bool zero, B beside) {
  if (zero) {
    _tile_zero(0);
    if (T > 1) _tile_zero(1);
    if (R > 1) _tile_zero(2);
    if (T > 1 && R > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    if (T > 1) _tile_loadd(1, sums + SUMS, 64);
    if (R > 1) _tile_loadd(2, sums + 2 * SUMS, 64);
    if (T > 1 && R > 1) _tile_loadd(3, sums + 3 * SUMS, 64);
  }
  for (int64_t i = 0; i < depth; ++i, w += TILE, x += TILE) {
    _tile_loadd(4, w, 64);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (T > 1) _tile_loadd(5, w + deep * TILE, 64);
    if (T > 1) _tile_dpbf16ps(1, 5, 6);
    if (R > 1) _tile_loadd(7, x + depth * TILE, 64);
    if (R > 1) _tile_dpbf16ps(2, 4, 7);
    if (T > 1 && R > 1) _tile_dpbf16ps(3, 5, 7);
    beside.step();
  }
  _tile_stored(0, sums, 64);
  if (T > 1) _tile_stored(1, sums + SUMS, 64);
  if (R > 1) _tile_stored(2, sums + 2 * SUMS, 64);
  if (T > 1 && R > 1) _tile_stored(3, sums + 3 * SUMS, 64);
}

// How a product is cut: chunks of `outs` outputs and `deep` tiles of inputs, of which there are `depth`; `tall` tiles of rows.
struct Cut {
  int64_t outs, deep, depth, tall;
  bool few;  // rows, so that sums stay in tiles from the first input to the last

  explicit Cut(const Product& p) {
    depth = words_for(p.k);
    tall = parts(p.rows, SIDE);
    few = p.rows <= FEW && p.rows * p.k <= FITS;
    outs = few ? PAIR : OUTS;
    deep = few ? depth : DEEP;
  }
  int64_t chunk() const { return outs * deep * 64; }  // bytes
  int64_t sums() const { return parts(tall, 2) * PAIR * outs * 4; }
  int64_t x(int64_t tile, int64_t row) const {  // where x's tiles for the chunk at `tile` and a tile of rows start
    return (tile * tall + row * std::min(deep, depth - tile)) * TILE;
  }
};

// Outputs [first, last), block of outputs after block and chunk after chunk of its inputs.
template <class W>
TILED void strip(const W& w, const Product& p, const Cut& cut, const char* packed, int64_t first, int64_t last, char* scratch) {
  const int64_t chunks = parts(cut.depth, cut.deep), steps = parts(last - first, cut.outs) * chunks;
  typename W::Row rows[2][OUTS + GROUP];
  float* const sums = reinterpret_cast<float*>(scratch + 2 * cut.chunk());
  uint8_t* const uppers = reinterpret_cast<uint8_t*>(scratch + 2 * cut.chunk() + cut.sums());

  const auto open = [&](int64_t step) {
    const int64_t from = first + step / chunks * cut.outs, tile = step % chunks * cut.deep;
    const int64_t outs = step < steps ? std::min(cut.outs, last - from) : 0;
    typename W::Row* here = rows[step / chunks % 2];
    for (int64_t o = 0; tile == 0 && o < parts(outs, GROUP) * GROUP; ++o) {
      here[o] = w.open(std::min(from + o, last - 1));
    }
    const int64_t inputs = std::min(cut.deep * LANES, p.k - tile * LANES);
    const int64_t ahead = !cut.few ? NEXT : outs <= 0 ? 0 : w.bytes(from, from + outs) / parts(outs, GROUP);
    return Layout<W>{w, here, outs, inputs, cut.deep, ahead, scratch + step % 2 * cut.chunk(), uppers};
  };

  open(0).step(ALL);
  for (int64_t step = 0; step < steps; ++step) {
    Layout<W> next = open(step + 1);
    const int64_t from = first + step / chunks * cut.outs, tile = step % chunks * cut.deep;
    const int64_t outs = std::min(cut.outs, last - from), depth = std::min(cut.deep, cut.depth - tile);
    const int64_t products = parts(cut.tall, 2) * parts(outs, PAIR) * depth;
    const int64_t pieces = parts(parts(cut.outs, GROUP) * parts(cut.deep, PIECE), products);
    float* c = sums;
    for (int64_t m = 0; m < cut.tall; m += 2)
      for (int64_t o = 0; o < outs; o += PAIR, c += 4 * SUMS) {
        const char* a = scratch + step % 2 * cut.chunk() + o * cut.deep * 64;
        const char* b = packed + cut.x(tile, m);
        const bool two = o + SIDE < outs, high = m + 1 < cut.tall;
        const Beside<W> beside{next, pieces, cut.few ? 0 : LINES, b + (2 + 2 * o / cut.outs) * depth * TILE};
        if (two && high) product<2, 2>(a, b, cut.deep, depth, c, tile == 0, beside);
        else if (two) product<2, 1>(a, b, cut.deep, depth, c, tile == 0, beside);
        else if (high) product<1, 2>(a, b, cut.deep, depth, c, tile == 0, beside);
        else product<1, 1>(a, b, cut.deep, depth, c, tile == 0, beside);
        if (tile + depth < cut.depth) continue;
        for (int i = 0; i < 4; ++i)
          if ((two || i % 2 == 0) && (high || i < 2)) finish(p, c + i * SUMS, (m + i / 2) * SIDE, from + o + i % 2 * SIDE);
      }
    next.step(ALL);
  }
}

template <class W>
TILED void multiply(const W& w, const Product& p, int threads) {
  static thread_local Buffer packs;
  const Cut cut(p);
  if (p.n * p.k < SERIAL) threads = 1;
  const int64_t step = std::max<int64_t>(1, p.n / cut.outs / (SHARES * threads)) * cut.outs;
  char* const packed = packs.of(cut.tall * cut.depth * TILE);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Buffer own;
    char* const scratch = own.of(2 * cut.chunk() + cut.sums() + GROUP * unpacked(p.k));
    const Config before = take_tiles();
#pragma omp for collapse(2)
    for (int64_t m = 0; m < cut.tall; ++m)
      for (int64_t i = 0; i < cut.depth; ++i) {
        const int64_t tile = i / cut.deep * cut.deep;
        pack(p, m * SIDE, i * LANES, packed + cut.x(tile, m) + (i - tile) * TILE);
      }
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < p.n; first += step)
      strip(w, p, cut, packed, first, std::min(first + step, p.n), scratch);
    give_back(before);
  }
}

// So many rows at a time that their sums stay in cache, as evenly as tiles allow.
template <class W>
void multiply_all(const W& w, Product p, int threads) {
  const int64_t all = p.rows, some = parts(parts(all, parts(all, MOST)), PAIR) * PAIR;
  for (int64_t row = 0; row < all; row += some, p.x += some * p.k, p.y += some * p.n) {
    p.rows = std::min(some, all - row);
    multiply(w, p, threads);
  }
}

}  // namespace

extern "C" {

// Whether there are tiles, and the kernel lets this process use them.
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
