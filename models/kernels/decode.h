// What a decoding step is given, and the kernels that it is made of.
//
// decode.cpp hands out the work; decode_kernels.h computes it, once for AVX-512 and once for every other processor.

#pragma once

#include <cstdint>

namespace decode {

// decode.py declares these again: keep them the same.

enum Format : int64_t { DENSE, PACKED, INT8, NF4 };

struct Matrix {
  const void* weight;  // [outputs, inputs], a `Packed` or `Nf4` of weights.h, or a `Weight` of int8.h
  const void* bias;    // [outputs], or null
  int64_t inputs, outputs;
  Format format;
};

struct Layer {
  const void *input_norm, *post_norm;
  Matrix qkv, out, gate_up, down;
  int64_t heads, kv_heads;
};

struct Model {
  const Layer* layers;
  const void* norm;
  const float* inv_freq;  // [head_dim / 2]
  Matrix head;
  int64_t num_layers, width, head_dim, avx512, bf16;  // the last two say which kernels
  float eps, rope_scaling;
};

// One request's new rows: a new token, or a part of its prompt. A layer without a slab does not run.
struct Request {
  const void* hidden;        // [rows, width]
  const void* bias;          // added to the scores of each cached row and the new ones, or null
  void* const* slabs;        // of each layer: [2, kv_heads, capacity, head_dim], keys before values
  const int64_t* capacity;   // rows of each layer's slab
  const int64_t* lengths;    // rows that stand in it
  const int64_t* positions;  // [rows], in the whole prompt and answer
  int64_t rows, logits;      // new rows, and of how many last ones logits are wanted
};

// A KV head of one request in one layer: what a task of its attention reads, and where it appends. Each new row has `group` queries.
struct Head {
  const float *query, *key, *value;  // of the first new row, as projected: [group, dim] and [dim] each
  int64_t stride;                    // values from one new row to the next
  const float *cos, *sin;            // [new rows, dim / 2]
  void *keys, *values;               // [rows, dim], the new ones to be appended
  const void* bias;                  // of all these rows, or null
  int64_t rows, group, dim;
  int64_t first, count;  // the queries to attend for, among those of all new rows
};

// Rows that several products read. What has the same number has the same values: a kernel may keep what it made of them.
struct Inputs {
  const void* at;
  int64_t number;
};

// Values of hidden states are float32 between products. A product's input is of `input_bytes` each: bfloat16 where the processor
// multiplies that, else float32.
struct Kernels {
  int64_t input_bytes;
  void (*widen)(const void* from, int64_t n, float* to);
  float (*rounded)(float);  // to the model's dtype
  void (*norm)(const float* x, const void* weight, int64_t width, float eps, void* input);
  void (*swiglu)(const float* gate, const float* up, int64_t n, void* input);
  // Outputs [first, last) of all rows, to y [rows, ...] whose rows are `stride` values apart.
  void (*product)(const Matrix&, const Inputs&, int64_t rows, int64_t first, int64_t last, float* y, int64_t stride);
  // Rotates queries and keys, appends keys and values of the new rows up to the last query's, attends: to [group, dim] of each new row,
  // `stride` values apart. For a request's only new row; and for at most `queries_at_once` queries of several.
  void (*attend)(const Head&, void* input, int64_t stride);
  void (*attend_many)(const Head&, void* input, int64_t stride);
  int64_t queries_at_once;
};

const Kernels* avx512_kernels(bool bf16);
const Kernels* portable_kernels(bool bf16);

}  // namespace decode
