// An inverted bottleneck (Tan & Le 2019, arXiv 1905.11946) in float32 on AVX-512: 1 x 1 expansion, depthwise convolution and 1 x 1
// projection in one pass, so that the expanded map, six times as wide as the others, never leaves the cache.
//
// A map is laid out [channels / 16, height, width, 16], with zeros for channels that are not there. A task is a band of rows and
// some expanded channels, 64 at a time: row after row they are expanded into a ring of as many rows as the depthwise kernel covers,
// and what comes out of it is added to the projection. Bands of a small map would expand too many rows twice, so there the channels are
// shared out instead, and the shares are added up.
//
// Tasks do not depend on the number of threads, so neither do results.

#include <cstdint>

#if defined(__x86_64__)

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "tiles.h"

namespace {

// vision/convolution.py declares these two again: keep them the same.

// Weights of products are [outputs / 16, inputs, 16].
struct Bottleneck {
  const float *expand, *expand_bias;        // inputs to wide; of the stem, a 3 x 3 convolution at stride 2 from pixels
  const float *depthwise, *depthwise_bias;  // [wide / 16, kernel, kernel, 16]
  const float *project, *project_bias;      // wide to outputs
  int64_t inputs, wide, outputs, kernel, stride, residual, stem;
};

struct Picture {
  const float* input;  // a map, or pixels [3, height, width]
  float* output;
  int64_t height, width;  // of the input
};

constexpr int64_t LANES = FLOAT_LANES;
constexpr int64_t MAX_VECTORS = 4;   // of outputs of a product that are summed side by side
constexpr int64_t MAX_KERNEL = 5;
constexpr int64_t MAX_ACROSS = 8;    // outputs of a depthwise convolution that are summed side by side
constexpr int64_t SMALL_MAP = 36;    // rows of outputs
constexpr int64_t BAND_ROWS = 16;    // of outputs, about
constexpr int64_t SHARES = 4;        // of the expanded channels of a small map
constexpr int64_t STEP_PIXELS = 64;  // that are projected at a time, about

// `whole` things in parts of at most `most`, as even as they can be.
struct Parts {
  int64_t whole, count;

  Parts(int64_t whole, int64_t most) : whole(whole), count(ceil_div(whole, most)) {}
  int64_t start(int64_t part) const { return whole * part / count; }
};

// A product's sums start at the bias, at what stands in `from`, at both or at zero.
struct Sums {
  const float *bias, *from;  // either may be null
  int64_t from_plane;        // floats between 16 channels and the next
  float* to;
  int64_t to_plane;
};

AVX512_INLINE __m512 relu6(__m512 x) { return _mm512_min_ps(_mm512_max_ps(x, _mm512_setzero_ps()), _mm512_set1_ps(6.0f)); }

// M pixels times N registers of outputs; x [inputs / 16, x_plane], of which each pixel has 16 values.
template <int M, int N, bool RELU6>
AVX512 void product(const float* x, int64_t x_plane, const float* w, int64_t w_plane, int64_t inputs, const Sums& sums) {
  __m512 s[M][N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const __m512 bias = sums.bias ? _mm512_loadu_ps(sums.bias + n * LANES) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      s[m][n] = sums.from ? _mm512_add_ps(bias, _mm512_loadu_ps(sums.from + n * sums.from_plane + m * LANES)) : bias;
  }
  for (int64_t plane = 0; plane < inputs; plane += LANES, x += x_plane) {
    const int64_t here = std::min(LANES, inputs - plane);
    for (int64_t i = 0; i < here; ++i, w += LANES) {
      __m512 weights[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) weights[n] = _mm512_loadu_ps(w + n * w_plane);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        __m512 in = _mm512_set1_ps(x[m * LANES + i]);
        if constexpr (N > 1) asm("" : "+v"(in));  // loaded once: GCC would load it again in every product
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) s[m][n] = _mm512_fmadd_ps(in, weights[n], s[m][n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) _mm512_storeu_ps(sums.to + n * sums.to_plane + m * LANES, RELU6 ? relu6(s[m][n]) : s[m][n]);
}

// Pixels that are summed side by side with so many registers of outputs: their sums, the weights and a pixel fit 32 registers.
constexpr int pixels_at_once(int vectors) { return vectors == 1 ? 14 : 24 / vectors; }

using ProductKernel = void (*)(const float*, int64_t, const float*, int64_t, int64_t, const Sums&);

template <int N, bool RELU6>
constexpr auto product_kernels() {
  return []<size_t... M>(std::index_sequence<M...>) {
    return std::array<ProductKernel, 14>{product<int(M) + 1, N, RELU6>...};
  }(std::make_index_sequence<pixels_at_once(N)>());
}
template <bool RELU6>
constexpr std::array<std::array<ProductKernel, 14>, MAX_VECTORS> PRODUCTS{
    product_kernels<1, RELU6>(), product_kernels<2, RELU6>(), product_kernels<3, RELU6>(), product_kernels<4, RELU6>()};

// Any number of pixels, which lie side by side, times `vectors` registers of outputs.
template <bool RELU6>
AVX512 void multiply(const float* x, int64_t x_plane, const float* w, int64_t w_plane, int64_t inputs, int64_t vectors,
                     int64_t pixels, Sums sums) {
  const Parts parts(pixels, pixels_at_once(vectors));
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t count = parts.start(part + 1) - parts.start(part);
    PRODUCTS<RELU6>[vectors - 1][count - 1](x, x_plane, w, w_plane, inputs, sums);
    x += count * LANES;
    sums.to += count * LANES;
    if (sums.from) sums.from += count * LANES;
  }
}

// X outputs side by side of a depthwise convolution of 16 channels; rows[i] + offset is the first one's first input.
template <int K, int S, int X>
AVX512 void depthwise(const float* const* rows, int64_t offset, const float* w, const float* bias, float* to) {
  __m512 s[X];
#pragma GCC unroll 8
  for (int x = 0; x < X; ++x) s[x] = _mm512_loadu_ps(bias);
  for (int row = 0; row < K; ++row, w += K * LANES) {
    const float* const from = rows[row] + offset;
    __m512 weights[K];
#pragma GCC unroll 5
    for (int k = 0; k < K; ++k) weights[k] = _mm512_loadu_ps(w + k * LANES);
#pragma GCC unroll 19
    for (int i = 0; i < (X - 1) * S + K; ++i) {
      const __m512 in = _mm512_loadu_ps(from + i * LANES);
#pragma GCC unroll 5
      for (int k = 0; k < K; ++k)
        if (i >= k && (i - k) % S == 0 && (i - k) / S < X) s[(i - k) / S] = _mm512_fmadd_ps(in, weights[k], s[(i - k) / S]);
    }
  }
#pragma GCC unroll 8
  for (int x = 0; x < X; ++x) _mm512_storeu_ps(to + x * LANES, relu6(s[x]));
}

using DepthwiseKernel = void (*)(const float* const*, int64_t, const float*, const float*, float*);
template <int K, int S>
constexpr std::array<DepthwiseKernel, MAX_ACROSS> DEPTHWISE{depthwise<K, S, 1>, depthwise<K, S, 2>, depthwise<K, S, 3>,
                                                            depthwise<K, S, 4>, depthwise<K, S, 5>, depthwise<K, S, 6>,
                                                            depthwise<K, S, 7>, depthwise<K, S, 8>};

const auto& depthwise_kernels(const Bottleneck& block) {
  if (block.kernel == 3) return block.stride == 1 ? DEPTHWISE<3, 1> : DEPTHWISE<3, 2>;
  return block.stride == 1 ? DEPTHWISE<5, 1> : DEPTHWISE<5, 2>;
}

// What one block makes of one picture.
struct Shape {
  int64_t height, width, out_height, out_width;  // of what is expanded, and of the output
  int64_t before, across;                        // columns of zeros before the first, and columns in all
  int64_t plane, out_plane, output;              // floats of 16 channels, of input and output, and of the whole output
  int64_t bands, shares;

  Shape(const Bottleneck& b, const Picture& p)
      : height(b.stem ? p.height / 2 : p.height), width(b.stem ? p.width / 2 : p.width), out_height(height / b.stride),
        out_width(width / b.stride), before(b.kernel / 2 - (b.stride - 1)),  // at stride 2 as TensorFlow pads even sizes
        across(std::max(before + width, (out_width - 1) * b.stride + b.kernel)), plane(height * width * LANES),
        out_plane(out_height * out_width * LANES), output(ceil_div(b.outputs, LANES) * out_plane) {
    const bool small = out_height <= SMALL_MAP;
    bands = small ? 1 : ceil_div(out_height, BAND_ROWS);
    shares = small ? std::min(SHARES, Parts(ceil_div(b.wide, LANES), MAX_VECTORS).count) : 1;
  }
};

struct Task {
  const Picture& picture;
  Shape shape;
  int64_t band, share;
  float* sums;  // the output or, for all shares but the first, as many floats elsewhere
};

// The inputs of the stem for a row of its outputs, as a map of one row. Of each place there are nine times three side by side: five
// fill a register but for its last value, and four are in the next one.
AVX512 void gather_stem(const Picture& p, int64_t row, int64_t width, float* to) {
  for (int64_t i = 0; i < 9; ++i) {
    const int64_t channel = i / 3, y = 2 * row + i % 3;
    const float* const from = p.input + (channel * p.height + y) * p.width;
    float* const at = to + (i < 5 ? i * 3 : width * LANES + (i - 5) * 3);
    for (int64_t x = 0; x < width; ++x) {
      const __mmask8 there = y >= p.height ? 0 : 2 * x + 2 < p.width ? 7 : 3;
      _mm_storeu_ps(at + x * LANES, _mm_maskz_loadu_ps(there, from + 2 * x));
    }
  }
}

// What a thread keeps for itself.
struct Scratch {
  Buffer ring, stem, middle;
};

float* reserve(Buffer& buffer, int64_t floats) { return reinterpret_cast<float*>(buffer.reserve(floats * sizeof(float))); }

// A task's rows through some expanded channels, at most MAX_VECTORS times 16 of them.
struct Group {
  const Bottleneck& b;
  const Task& t;
  const Shape& s;
  int64_t first, vectors;  // times 16 channels
  bool starts;             // the projection's sums
  int64_t step, rows_in_ring, line, ring_plane;
  float *ring, *stem, *middle;

  Group(const Bottleneck& b, const Task& t, int64_t first, int64_t last, bool starts, Scratch& scratch)
      : b(b), t(t), s(t.shape), first(first), vectors(last - first), starts(starts),
        step(std::max<int64_t>(1, STEP_PIXELS / s.out_width)), rows_in_ring((step - 1) * b.stride + b.kernel),
        line(s.across * LANES), ring_plane(rows_in_ring * line), ring(reserve(scratch.ring, vectors * ring_plane)),
        stem(reserve(scratch.stem, 2 * s.width * LANES)), middle(reserve(scratch.middle, vectors * step * s.out_width * LANES)) {
    std::memset(ring, 0, vectors * ring_plane * sizeof(float));
  }

  // Rows of outputs [first_row, last_row).
  void run(int64_t first_row, int64_t last_row) {
    int64_t next = first_row * b.stride - s.before;  // row to expand
    for (int64_t row = first_row; row < last_row; row += step) {
      const int64_t rows = std::min(step, last_row - row), pixels = rows * s.out_width;
      for (const int64_t end = (row + rows - 1) * b.stride - s.before + b.kernel; next < end; ++next) expand(next);
      for (int64_t r = 0; r < rows; ++r) convolve(row + r, pixels, middle + r * s.out_width * LANES);
      project(row, pixels);
    }
  }

 private:
  float* line_of(int64_t v, int64_t row) const { return ring + v * ring_plane + (row + b.kernel) % rows_in_ring * line; }

  void expand(int64_t row) {
    float* const to = line_of(0, row) + s.before * LANES;
    if (row < 0 || row >= s.height) {
      for (int64_t v = 0; v < vectors; ++v) std::memset(to + v * ring_plane, 0, s.width * LANES * sizeof(float));
      return;
    }
    if (b.stem) gather_stem(t.picture, row, s.width, stem);
    multiply<true>(b.stem ? stem : t.picture.input + row * s.width * LANES, b.stem ? s.width * LANES : s.plane,
                   b.expand + first * b.inputs * LANES, b.inputs * LANES, b.inputs, vectors, s.width,
                   {b.expand_bias + first * LANES, nullptr, 0, to, ring_plane});
  }

  void convolve(int64_t row, int64_t pixels, float* to) {
    const auto& kernels = depthwise_kernels(b);
    const Parts parts(s.out_width, MAX_ACROSS);
    for (int64_t v = 0; v < vectors; ++v, to += pixels * LANES) {
      const float* const bias = b.depthwise_bias + (first + v) * LANES;
      const float* const w = b.depthwise + (first + v) * b.kernel * b.kernel * LANES;
      const float* lines[MAX_KERNEL];
      for (int64_t k = 0; k < b.kernel; ++k) lines[k] = line_of(v, row * b.stride - s.before + k);
      for (int64_t part = 0; part < parts.count; ++part) {
        const int64_t x = parts.start(part);
        kernels[parts.start(part + 1) - x - 1](lines, x * b.stride * LANES, w, bias, to + x * LANES);
      }
    }
  }

  void project(int64_t row, int64_t pixels) {
    const Parts parts(ceil_div(b.outputs, LANES), MAX_VECTORS);
    const int64_t inputs = std::min(vectors * LANES, b.wide - first * LANES);
    const bool bias = starts && !t.share;
    for (int64_t part = 0; part < parts.count; ++part) {
      const int64_t out = parts.start(part), place = out * s.out_plane + row * s.out_width * LANES;
      const float* const from = !starts ? t.sums + place : bias && b.residual ? t.picture.input + place : nullptr;
      multiply<false>(middle, pixels * LANES, b.project + (out * b.wide + first * LANES) * LANES, b.wide * LANES, inputs,
                      parts.start(part + 1) - out, pixels,
                      {bias ? b.project_bias + out * LANES : nullptr, from, s.out_plane, t.sums + place, s.out_plane});
    }
  }
};

void run(const Bottleneck& b, const Task& t, Scratch& scratch) {
  const Shape& s = t.shape;
  const Parts groups(ceil_div(b.wide, LANES), MAX_VECTORS);
  const int64_t first = groups.count * t.share / s.shares, last = groups.count * (t.share + 1) / s.shares;
  for (int64_t i = first; i < last; ++i)
    Group(b, t, groups.start(i), groups.start(i + 1), i == first, scratch)
        .run(s.out_height * t.band / s.bands, s.out_height * (t.band + 1) / s.bands);
}

}  // namespace

extern "C" {

// Each picture through one block.
void inverted_bottleneck(const Bottleneck* bottleneck, const Picture* pictures, int64_t count, int threads) {
  static thread_local Buffer shared;
  std::vector<Task> tasks;
  int64_t floats = 0;
  for (const Picture* p = pictures; p < pictures + count; ++p) {
    const Shape shape(*bottleneck, *p);
    floats += (shape.shares - 1) * shape.output;
    for (int64_t share = 0; share < shape.shares; ++share)
      for (int64_t band = 0; band < shape.bands; ++band) tasks.push_back({*p, shape, band, share, p->output});
  }
  float* sums = reserve(shared, floats);
  for (Task& t : tasks)
    if (t.share) t.sums = sums, sums += t.shape.output;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); ++i) run(*bottleneck, tasks[i], scratch);
    for (const Task& t : tasks)
      if (t.share)
#pragma omp for schedule(static) nowait  // a thread adds up the same places of all shares
        for (int64_t i = 0; i < t.shape.output; ++i) t.picture.output[i] += t.sums[i];
  }
}
}

#endif
