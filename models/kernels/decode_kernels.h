// The kernels of a decoding step, over what the including file defines: TARGET and TARGET_INLINE, registers `V` of LANES floats and
// their operations, `Input<T>` (see decode.h), `dots` and `product`. Weights and caches are of type T, float or bf16.

#include "decode.h"

namespace decode {

namespace {

#define TARGET_LAMBDA TARGET __attribute__((always_inline))

// Calls body(i, lanes) for each register of n values; the last one may be partial.
template <class Body>
TARGET_INLINE void for_each_register(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) body(i, Whole{});
  if (i < n) body(i, First{n - i});
}

// e^x for x <= 0, NaN for NaN; relative error 2e-6. 2^n times the Taylor polynomial of the remainder.
TARGET_INLINE V exp_nonpositive(V x) {
  const V scaled = mul(max_or_nan(set(-87.0f), x), set(1.44269504f)), whole = nearest(scaled);
  const V t = mul(sub(scaled, whole), set(0.69314718f));
  V sum = set(1.0f / 120);
  for (const float next : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = fma(sum, t, set(next));
  return mul(sum, power_of_two(whole));
}

TARGET_INLINE V sigmoid(V x) {
  const V e = exp_nonpositive(negative_abs(x)), positive = div(set(1.0f), add(set(1.0f), e));
  return where_negative(x, mul(positive, e), positive);
}

template <class T>
TARGET void widen(const void* from, int64_t n, float* to) {
  for_each_register(n, [&](int64_t i, auto lanes) TARGET_LAMBDA { store(to + i, load(static_cast<const T*>(from) + i, lanes), lanes); });
}

template <class T>
TARGET_INLINE float value(T held) {
  return first(load(&held, First{1}));
}

template <class T>
TARGET float rounded(float exact) {
  T held;
  store(&held, set(exact), First{1});
  return value(held);
}

template <class T>
TARGET void norm(const float* x, const void* weight, int64_t width, float eps, void* input) {
  V squares = set(0.0f);
  for_each_register(width, [&](int64_t i, auto lanes) TARGET_LAMBDA {
    const V value = load(x + i, lanes);
    squares = fma(value, value, squares);
  });
  const V scale = set(1.0f / std::sqrt(sum(squares) / width + eps));
  for_each_register(width, [&](int64_t i, auto lanes) TARGET_LAMBDA {
    const V scaled = mul(mul(load(x + i, lanes), scale), load(static_cast<const T*>(weight) + i, lanes));
    store(static_cast<Input<T>*>(input) + i, scaled, lanes);
  });
}

template <class T>
TARGET void swiglu(const float* gate, const float* up, int64_t n, void* input) {
  for_each_register(n, [&](int64_t i, auto lanes) TARGET_LAMBDA {
    const V g = load(gate + i, lanes);
    store(static_cast<Input<T>*>(input) + i, mul(mul(g, sigmoid(g)), load(up + i, lanes)), lanes);
  });
}

// Rotary position embedding of x [dim], in halves as in LLaMA.
template <class T>
TARGET_INLINE void rotate(const float* x, const Head& head, int64_t row, T* to) {
  const int64_t half = head.dim / 2;
  const float *const cos = head.cos + row * half, *const sin = head.sin + row * half;
  for_each_register(half, [&](int64_t i, auto lanes) TARGET_LAMBDA {
    const V first = load(x + i, lanes), second = load(x + half + i, lanes);
    const V c = load(cos + i, lanes), s = load(sin + i, lanes);
    store(to + i, sub(mul(first, c), mul(second, s)), lanes);
    store(to + half + i, fma(second, c, mul(first, s)), lanes);
  });
}

// Appends keys and values of the first `count` new rows.
template <class T>
TARGET_INLINE void append(const Head& head, int64_t count) {
  for (int64_t row = 0; row < count; ++row) {
    const int64_t from = row * head.stride, to = (head.rows + row) * head.dim;
    rotate(head.key + from, head, row, static_cast<T*>(head.keys) + to);
    for_each_register(head.dim, [&](int64_t i, auto lanes) TARGET_LAMBDA {
      store(static_cast<T*>(head.values) + to + i, load(head.value + from + i, lanes), lanes);
    });
  }
}

// Replaces scores, `padded` to whole registers with -inf, by the exponentials of softmax; returns their sum.
TARGET_INLINE float exponentiate(float* scores, int64_t padded) {
  V largest = load(scores, Whole{}), all = set(0.0f);
  for (int64_t t = 0; t < padded; t += LANES) largest = max_or_nan(largest, load(scores + t, Whole{}));
  const V top = set(largest_of(largest));
  for (int64_t t = 0; t < padded; t += LANES) {
    const V e = exp_nonpositive(sub(load(scores + t, Whole{}), top));
    all = add(all, e);
    store(scores + t, e, Whole{});
  }
  return sum(all);
}

// What cached rows weigh for some queries: `stride` values from one query to the next, STEP from one row to the next.
template <int STEP, class T>
struct Weights {
  const T* values;            // [rows, dim]
  const float *at, *inverse;  // of each query: its weights, and one over their sum
  int64_t rows, dim, stride;
  Input<T>* const* out;  // of each query: [dim]

  Weights from(int64_t query) const { return {values, at + query * stride, inverse + query, rows, dim, stride, out + query}; }
};

// Weighted sums of D registers of each row of values, from value `i` on, for G queries.
template <int G, int D, int STEP, class T, class Lanes>
TARGET_INLINE void weighted_sum(const Weights<STEP, T>& w, int64_t i, Lanes lanes) {
  V sums[G][D];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) sums[g][d] = set(0.0f);
  const T* const values = w.values + i;
  for (int64_t t = 0; t < w.rows; ++t) {
    V row[D];
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) row[d] = load(values + t * w.dim + d * LANES, lanes);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) sums[g][d] = fma(set(w.at[g * w.stride + t * STEP]), row[d], sums[g][d]);
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int d = 0; d < D; ++d) store(w.out[g] + i + d * LANES, mul(sums[g][d], set(w.inverse[g])), lanes);
}

template <int G, int STEP, class T>
TARGET void weighted_sums(const Weights<STEP, T>& w) {
  constexpr int D = SUMS / G > 4 ? 4 : SUMS / G;  // so that the sums stay in registers
  int64_t i = 0;
  for (; i + D * LANES <= w.dim; i += D * LANES) weighted_sum<G, D>(w, i, Whole{});
  for (; i + LANES <= w.dim; i += LANES) weighted_sum<G, 1>(w, i, Whole{});
  if (i < w.dim) weighted_sum<G, 1>(w, i, First{w.dim - i});
}

template <int STEP, class T>
TARGET void mix(const Weights<STEP, T>& w, int64_t queries) {
  constexpr void (*SOME[])(const Weights<STEP, T>&) = {
      weighted_sums<1, STEP, T>, weighted_sums<2, STEP, T>, weighted_sums<3, STEP, T>, weighted_sums<4, STEP, T>};
  for (int64_t q = 0; q < queries; q += 4) SOME[std::min<int64_t>(queries - q, 4) - 1](w.from(q));
}

template <class T>
TARGET void attend(const Head& head, void* to, int64_t) {
  static thread_local std::vector<float> scratch;
  static thread_local std::vector<Input<T>*> out;
  const int64_t dim = head.dim, rows = head.rows + 1, group = head.group;
  const int64_t padded = (rows + KEYS + LANES) / LANES * LANES, query_floats = (group * dim + LANES) / LANES * LANES;
  scratch.resize(std::max<size_t>(scratch.size(), query_floats + group * (padded + 1)));
  Input<T>* const query = reinterpret_cast<Input<T>*>(scratch.data());
  float *const scores = scratch.data() + query_floats, *const inverse = scores + group * padded;
  const T* const keys = static_cast<const T*>(head.keys);
  for (int64_t g = 0; g < group; ++g) rotate(head.query + g * dim, head, 0, query + g * dim);
  append<T>(head, 1);
  const float scale = 1.0f / std::sqrt(float(dim));
  const T* const bias = static_cast<const T*>(head.bias);
  for (int64_t t = 0; t < rows; t += KEYS) {
    const T* some[KEYS];
    for (int i = 0; i < KEYS; ++i) some[i] = keys + std::min(t + i, head.rows) * dim;
    for (int64_t g = 0; g < group; ++g) dots(query + g * dim, some, dim, scores + g * padded + t);
  }
  for (int64_t g = 0; g < group; ++g) {
    float* const own = scores + g * padded;
    for_each_register(rows, [&](int64_t t, auto lanes) TARGET_LAMBDA {
      const V added = bias ? load(bias + t, lanes) : set(0.0f);
      store(own + t, fma(load(own + t, lanes), set(scale), added), lanes);
    });
    std::fill(own + rows, own + padded, -INFINITY);
    inverse[g] = 1.0f / exponentiate(own, padded);
  }
  out.resize(group);
  for (int64_t g = 0; g < group; ++g) out[g] = static_cast<Input<T>*>(to) + g * dim;
  mix(Weights<1, T>{static_cast<const T*>(head.values), scores, inverse, rows, dim, padded, out.data()}, group);
}

// Scores of the queries `turned` [dim, LANES] with the keys of all `rows`: to [rows, LANES], in whole turns of AT_ONCE keys.
template <int AT_ONCE, class T>
TARGET void score(const float* turned, const Head& head, int64_t rows, float* wide, float* scores) {
  const T *const keys = static_cast<const T*>(head.keys), *const bias = static_cast<const T*>(head.bias);
  for (int64_t t = 0; t < rows; t += AT_ONCE) {
    V s[AT_ONCE];
#pragma GCC unroll 16
    for (int j = 0; j < AT_ONCE; ++j) {
      const int64_t row = std::min(t + j, rows - 1);
      widen<T>(keys + row * head.dim, head.dim, wide + j * head.dim);
      s[j] = set(bias ? value(bias[row]) : 0.0f);
    }
    for (int64_t i = 0; i < head.dim; ++i) {
      const V query = load(turned + i * LANES, Whole{});
#pragma GCC unroll 16
      for (int j = 0; j < AT_ONCE; ++j) s[j] = fma(set(wide[j * head.dim + i]), query, s[j]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < AT_ONCE; ++j) store(scores + (t + j) * LANES, s[j], Whole{});
  }
}

// Up to LANES queries, each in a lane of its own: nothing is summed across lanes, and a cached row is read once for all of them.
template <class T>
TARGET void attend_many(const Head& head, void* to, int64_t stride) {
  constexpr int AT_ONCE = REGISTERS / 2;
  static thread_local std::vector<float> scratch;
  const int64_t dim = head.dim;
  const auto place = [&](int64_t q) { return (head.first + q) / head.group; };  // a query's row among the new ones
  const int64_t rows = head.rows + place(head.count - 1) + 1, padded = (rows + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
  scratch.resize(std::max<size_t>(scratch.size(), (dim + padded + 1) * LANES + (AT_ONCE + 1) * dim));
  float *const turned = scratch.data(), *const scores = turned + dim * LANES, *const inverse = scores + padded * LANES;
  float *const wide = inverse + LANES, *const rotated = wide + AT_ONCE * dim;
  append<T>(head, rows - head.rows);
  std::fill(turned, turned + dim * LANES, 0.0f);
  Input<T>* out[LANES];
  for (int64_t q = 0; q < head.count; ++q) {
    const int64_t row = place(q), g = (head.first + q) % head.group;
    rotate(head.query + row * head.stride + g * dim, head, row, rotated);
    for (int64_t i = 0; i < dim; ++i) turned[i * LANES + q] = rotated[i] / std::sqrt(float(dim));
    out[q] = static_cast<Input<T>*>(to) + row * stride + g * dim;
  }
  score<AT_ONCE, T>(turned, head, rows, wide, scores);
  for (int64_t t = head.rows + place(0) + 1; t < rows; ++t)
    for (int64_t q = 0; head.rows + place(q) < t; ++q) scores[t * LANES + q] = -INFINITY;  // behind the query's own row
  V largest = load(scores, Whole{}), all = set(0.0f);
  for (int64_t t = 1; t < rows; ++t) largest = max_or_nan(largest, load(scores + t * LANES, Whole{}));
  for (int64_t t = 0; t < rows; ++t) {
    const V e = exp_nonpositive(sub(load(scores + t * LANES, Whole{}), largest));
    all = add(all, e);
    store(scores + t * LANES, e, Whole{});
  }
  store(inverse, div(set(1.0f), all), Whole{});
  mix(Weights<LANES, T>{static_cast<const T*>(head.values), scores, inverse, rows, dim, 1, out}, head.count);
}

// R rows of x times O rows of a dense W from `first` on.
template <int R, int O, class T>
TARGET_INLINE void block(const T* weights, const T* bias, int64_t k, const float* x, int64_t first, float* y, int64_t stride) {
  V all[O * R];
#pragma GCC unroll 32
  for (int i = 0; i < O * R; ++i) all[i] = set(0.0f);
  const T* const w = weights + first * k;
  const int64_t ahead = std::max<int64_t>(O * k, PREFETCH_BYTES / sizeof(T));
  for_each_register(k, [&](int64_t i, auto lanes) TARGET_LAMBDA {
    V loaded[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      loaded[o] = load(w + o * k + i, lanes);
      __builtin_prefetch(w + o * k + i + ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V input = load(x + r * k + i, lanes);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) all[o * R + r] = fma(input, loaded[o], all[o * R + r]);
    }
  });
  float totals[O * R];
  sums(all, totals);
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) {
    const float added = bias ? value(bias[first + o]) : 0.0f;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) y[r * stride + o] = totals[o * R + r] + added;
  }
}

template <int R, class T>
TARGET void strip(const T* weights, const T* bias, int64_t k, const float* x, int64_t first, int64_t last, float* y, int64_t stride) {
  constexpr int O = R * 4 + R + 4 <= REGISTERS ? 4 : R * 2 + R + 2 <= REGISTERS ? 2 : 1;
  for (; first + O <= last; first += O, y += O) block<R, O>(weights, bias, k, x, first, y, stride);
  for (; first < last; ++first, ++y) block<R, 1>(weights, bias, k, x, first, y, stride);
}

// A dense product with float32 inputs. An output is summed in the order of its inputs, for any number of rows.
template <class T>
TARGET void dense_product(const Matrix& m, const Inputs& inputs, int64_t rows, int64_t first, int64_t last, float* y, int64_t stride) {
  constexpr void (*STRIPS[])(const T*, const T*, int64_t, const float*, int64_t, int64_t, float*, int64_t) = {
      strip<1, T>, strip<2, T>, strip<3, T>, strip<4, T>};
  const T *const weights = static_cast<const T*>(m.weight), *const bias = static_cast<const T*>(m.bias);
  const float* const x = static_cast<const float*>(inputs.at);
  for (int64_t r = 0; r < rows; r += 4)
    STRIPS[std::min<int64_t>(rows - r, 4) - 1](weights, bias, m.inputs, x + r * m.inputs, first, last, y + r * stride, stride);
}

template <class T>
constexpr Kernels kernels(decltype(Kernels::product) product) {
  return {sizeof(Input<T>), widen<T>, rounded<T>, norm<T>, swiglu<T>, product, attend<T>, attend_many<T>, LANES};
}

}  // namespace
}  // namespace decode
