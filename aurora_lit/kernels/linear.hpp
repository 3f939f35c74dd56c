// A linear layer over packed weights: vector instructions, for every processor and for fp32.
// Weights lie as one sequential stream (blocks of 32 outputs, input index inside), because at one row the time of a
// linear layer is the time to read it.
#pragma once

#include "words.hpp"

namespace {

constexpr int BLOCK = 32;    // outputs of one block of packed weights: two vectors
constexpr int MAX_ROWS = 6;  // rows that share one read of a block

struct Float {  // one input index a step
  typedef float Weight;
  typedef float Input;
  static constexpr int STEP = 1;
  static inline void step(const float* w, const float* const* x, int k, f16v (*acc)[2], int rows) {
    const f16v w0 = *reinterpret_cast<const f16v*>(w), w1 = *reinterpret_cast<const f16v*>(w + 16);
    for (int r = 0; r < rows; ++r) {
      acc[r][0] += x[r][k] * w0;
      acc[r][1] += x[r][k] * w1;
    }
  }
};

struct BFloat {  // two input indices a step, side by side in one 32-bit lane
  typedef uint16_t Weight;
  typedef uint16_t Input;
  static constexpr int STEP = 2;
  static inline void step(const uint16_t* w, const uint16_t* const* x, int k, f16v (*acc)[2], int rows) {
    for (int r = 0; r < rows; ++r) {
      uint32_t pair;
      std::memcpy(&pair, x[r] + k, 4);
#if defined(__AVX512BF16__)
      const __m512bh xb = (__m512bh)_mm512_set1_epi32(int(pair));
      acc[r][0] = (f16v)_mm512_dpbf16_ps((__m512)acc[r][0], (__m512bh)_mm512_loadu_si512(w), xb);
      acc[r][1] = (f16v)_mm512_dpbf16_ps((__m512)acc[r][1], (__m512bh)_mm512_loadu_si512(w + 32), xb);
#else
      const float lo = from_bf16(uint16_t(pair)), hi = from_bf16(uint16_t(pair >> 16));
      for (int v = 0; v < 2; ++v) {
        const u16v raw = *reinterpret_cast<const u16v*>(w + 32 * v);
        acc[r][v] += lo * (f16v)(raw << 16);
        acc[r][v] += hi * (f16v)(raw & 0xffff0000u);
      }
#endif
    }
  }
};

// One row's sums of a block into the output: set, or added to what is there (a residual stream).
inline void put_row(const float* sums, float* row, int width, const float* bias, bool add) {
  if (add)
    for (int i = 0; i < width; ++i) row[i] += sums[i];
  else
    std::memcpy(row, sums, size_t(width) * sizeof(float));
  for (int i = 0; bias && i < width; ++i) row[i] += bias[i];
}

template <class Kind, int ROWS>
void block_rows(const typename Kind::Weight* w, const typename Kind::Input* x, ptrdiff_t x_stride, int k_padded,
                float* y, ptrdiff_t y_stride, int width, const float* bias, bool add) {
  f16v acc[ROWS][2];
  const typename Kind::Input* rows[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    acc[r][0] = acc[r][1] = f16v{};
    rows[r] = x + r * x_stride;
  }
  for (int k = 0; k < k_padded; k += Kind::STEP) Kind::step(w + ptrdiff_t(k) * BLOCK, rows, k, acc, ROWS);
  for (int r = 0; r < ROWS; ++r) {
    float out[BLOCK];
    std::memcpy(out, acc[r], sizeof out);
    put_row(out, y + r * y_stride, width, bias, add);
  }
}

inline int num_blocks(int outputs) { return (outputs + BLOCK - 1) / BLOCK; }

// Blocks [from, to) of the outputs.
template <class Kind>
void linear_blocks(const typename Kind::Input* x, ptrdiff_t x_stride, int rows, const typename Kind::Weight* w,
                   int k_padded, int outputs, float* y, const float* bias, bool add, int from, int to) {
  for (int b = from; b < to; ++b) {
    const int first = b * BLOCK, width = outputs - first < BLOCK ? outputs - first : BLOCK;
    const typename Kind::Weight* wb = w + ptrdiff_t(b) * BLOCK * k_padded;
    const float* bb = bias ? bias + first : nullptr;
    for (int r = 0; r < rows; r += MAX_ROWS) {
      const int n = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
      const typename Kind::Input* xr = x + r * x_stride;
      float* yr = y + ptrdiff_t(r) * outputs + first;
      switch (n) {
        case 1: block_rows<Kind, 1>(wb, xr, x_stride, k_padded, yr, outputs, width, bb, add); break;
        case 2: block_rows<Kind, 2>(wb, xr, x_stride, k_padded, yr, outputs, width, bb, add); break;
        case 3: block_rows<Kind, 3>(wb, xr, x_stride, k_padded, yr, outputs, width, bb, add); break;
        case 4: block_rows<Kind, 4>(wb, xr, x_stride, k_padded, yr, outputs, width, bb, add); break;
        case 5: block_rows<Kind, 5>(wb, xr, x_stride, k_padded, yr, outputs, width, bb, add); break;
        default: block_rows<Kind, 6>(wb, xr, x_stride, k_padded, yr, outputs, width, bb, add); break;
      }
    }
  }
}

}  // namespace
