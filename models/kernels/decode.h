// What a decoding step is given, and the kernels that it is made of.
//
// decode.cpp hands out the work; decode_kernels.h computes it, once for AVX-512 and once for every other processor.

#pragma once

#include <cstdint>

namespace decode {

// decode.py declares these three again: keep them the same.

struct Matrix {
  const void* weight;  // [outputs, inputs], or a `Packed` of weights.h
  const void* bias;    // [outputs], or null
  int64_t inputs, outputs, packed;
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

// One request's new row. A layer without a slab does not run.
struct Request {
  const void* hidden;       // [width]
  const void* bias;         // added to the scores of each cached row and the new one, or null
  void* const* slabs;       // of each layer: [2, kv_heads, capacity, head_dim], keys before values
  const int64_t* capacity;  // rows of each layer's slab
  const int64_t* lengths;   // rows that stand in it
  int64_t position;         // in the whole prompt and answer
};

// A KV head of one request in one layer: what its task reads and where it appends.
struct Head {
  const float *query, *key, *value;  // of the new row, as projected: [group, dim] and [dim] each
  const float *cos, *sin;            // [dim / 2]
  void *keys, *values;               // [rows, dim], the new one to be appended
  const void* bias;                  // [rows + 1], or null
  int64_t rows, group, dim;
};

// Values of hidden states are float32 between products. A product's input is of `input_bytes` each: bfloat16 where the processor
// multiplies that, else float32.
struct Kernels {
  int64_t input_bytes;
  void (*widen)(const void* from, int64_t n, float* to);
  float (*rounded)(float);  // to the model's dtype
  void (*norm)(const float* x, const void* weight, int64_t width, float eps, void* input);
  void (*swiglu)(const float* gate, const float* up, int64_t n, void* input);
  // Outputs [first, last) of all rows of `inputs`, to y [rows, ...] whose rows are `stride` values apart.
  void (*product)(const Matrix&, const void* inputs, int64_t rows, int64_t first, int64_t last, float* y, int64_t stride);
  // Rotates query and key, appends key and value, attends: to [group, dim].
  void (*attend)(const Head&, void* input);
};

const Kernels* avx512_kernels(bool bf16);
const Kernels* portable_kernels(bool bf16);

}  // namespace decode
