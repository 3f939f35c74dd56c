// A linear layer over packed weights: vector instructions, for every processor and every kind of weight.
// Weights lie as one sequential stream (blocks of 32 outputs, input index inside), because at one row the time of a
// linear layer is the time to read it.
#pragma once

#include "groups.hpp"

namespace {

#if defined(__AVX512F__)
constexpr int MAX_ROWS = 12;  // rows that share one read of a block: their sums fill the registers
#else
constexpr int MAX_ROWS = 6;
#endif

// What kinds of weights have in common that are read a few inputs at a time, for all of a block's outputs.
template <class Kind>
struct Stepwise {
  static ptrdiff_t block_size(int k) { return ptrdiff_t(k) * BLOCK; }
  template <int ROWS, class Number>
  static void sums(const Number* w, const Number* x, ptrdiff_t x_stride, int k_padded, const Stream& stream,
                   f16v (*total)[2]) {
    const Number* rows[ROWS];
    for (int r = 0; r < ROWS; ++r) rows[r] = x + r * x_stride;
    for (int k = 0; k < k_padded; k += Kind::STEP) {
      stream.ask<Kind::STEP * BLOCK * int(sizeof(Number))>(w + ptrdiff_t(k) * BLOCK);
      Kind::step(w + ptrdiff_t(k) * BLOCK, rows, k, total, ROWS);
    }
  }
};

struct Float : Stepwise<Float> {  // one input index a step
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

struct BFloat : Stepwise<BFloat> {  // two input indices a step, side by side in one 32-bit lane
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
  const bool whole = width == BLOCK;
  for (int v = 0; whole && v < BLOCK; v += 16) {
    f16v y = *reinterpret_cast<const f16v*>(sums + v);
    if (add) y += *reinterpret_cast<const f16v*>(row + v);
    if (bias) y += *reinterpret_cast<const f16v*>(bias + v);
    std::memcpy(row + v, &y, sizeof y);
  }
  for (int i = whole ? width : 0; i < width; ++i) {
    const float y = add ? row[i] + sums[i] : sums[i];
    row[i] = bias ? y + bias[i] : y;
  }
}

template <class Kind, int ROWS>
void block_rows(const typename Kind::Weight* w, const typename Kind::Input* x, ptrdiff_t x_stride, int k_padded,
                const Stream& stream, float* y, ptrdiff_t y_stride, int width, const float* bias, bool add) {
  f16v acc[ROWS][2];
  for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = f16v{};
  Kind::template sums<ROWS>(w, x, x_stride, k_padded, stream, acc);
  for (int r = 0; r < ROWS; ++r) {
    float out[BLOCK];
    std::memcpy(out, acc[r], sizeof out);
    put_row(out, y + r * y_stride, width, bias, add);
  }
}

inline int num_blocks(int outputs) { return (outputs + BLOCK - 1) / BLOCK; }

// A block's sums for the `rows` rows that share one read of it.
template <class Kind, int ROWS = MAX_ROWS>
void block_of(int rows, const typename Kind::Weight* w, const typename Kind::Input* x, ptrdiff_t x_stride, int k_padded,
              const Stream& stream, float* y, ptrdiff_t y_stride, int width, const float* bias, bool add) {
  if constexpr (ROWS > 1)
    if (rows < ROWS)
      return block_of<Kind, ROWS - 1>(rows, w, x, x_stride, k_padded, stream, y, y_stride, width, bias, add);
  block_rows<Kind, ROWS>(w, x, x_stride, k_padded, stream, y, y_stride, width, bias, add);
}

// Blocks [from, to) of the outputs.
template <class Kind>
void linear_blocks(const typename Kind::Input* x, ptrdiff_t x_stride, int rows, const typename Kind::Weight* w,
                   int k_padded, int outputs, const Stream& stream, float* y, const float* bias, bool add, int from,
                   int to) {
  for (int b = from; b < to; ++b) {
    const int first = b * BLOCK, width = outputs - first < BLOCK ? outputs - first : BLOCK;
    const typename Kind::Weight* wb = w + Kind::block_size(k_padded) * b;
    const float* bb = bias ? bias + first : nullptr;
    int parts = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int r = 0, n; r < rows; r += n, --parts) {
      n = (rows - r + parts - 1) / parts;
      block_of<Kind>(n, wb, x + r * x_stride, x_stride, k_padded, stream, y + ptrdiff_t(r) * outputs + first, outputs,
                     width, bb, add);
    }
  }
}

}  // namespace
