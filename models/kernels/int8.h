// Products with a weight of 8 bits, LLM.int8() (arXiv 2208.07339), on AVX-512 with VNNI.
//
// Rows of x are rounded to 8 bits, but for outliers, which are multiplied unrounded. Codes meet in whole numbers: a row's result is the
// same bit for bit whatever stands beside it, and whether it runs in a decoding step or in a prompt.

#pragma once

#include <cstdint>
#include <vector>

#include "weights.h"

namespace int8 {

struct Weight {
  const int8_t* codes;  // [outputs, inputs]
  const float* scales;  // [outputs], what code 127 is worth
  const int32_t* sums;  // [outputs], of the codes
  float outlier;        // values of x from here on are not rounded
};

// Some rows of x in 8 bits.
struct Rounded {
  int64_t rows = 0, inputs = 0, stride = 0;  // bytes from row to row
  Buffer codes;                              // [rows, stride] of uint8_t: 128 is added, as vpdpbusd takes x without sign
  std::vector<float> scales;                 // [rows], what a code is worth
  std::vector<int64_t> starts;               // of each row's outliers among all, and one more
  std::vector<float> outliers;
  std::vector<int32_t> place;      // of each outlier: which of `columns` it is in
  std::vector<int32_t> columns;    // inputs that have outliers
  std::vector<int32_t> column_of;  // [inputs], -1 where there is none

  const uint8_t* row(int64_t i) const { return reinterpret_cast<const uint8_t*>(codes.at) + i * stride; }

  // Of x [count, k], float or bf16. Values from `outlier` on are kept as they are.
  template <class T>
  void round(const T* x, int64_t count, int64_t k, float outlier);
};

// Outputs [first, last) of all rows of x, plus `bias` of all outputs unless it is null: to y [rows, ...], `stride` values from row to row,
// from output `first` on.
template <class Y, class B>
void outputs(const Weight& w, const Rounded& x, const B* bias, int64_t first, int64_t last, Y* y, int64_t stride);

}  // namespace int8
