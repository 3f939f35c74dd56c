// Linear layers over packed weights with vector instructions: for every processor, in the fp32, bf16 and grouped
// formats. Weights are stored in the order in which they are read (blocks of 32 outputs, the input index inside),
// because for a single row a linear layer takes as long as reading its weight.
#pragma once

#include "grouped.hpp"

namespace {

// For formats that are read a few inputs at a time, for all outputs of a block.
template <class Format>
struct Stepwise {
  // Rows that share one read of a block; their sums fill the registers.
#if defined(__AVX512F__)
  static constexpr int MAX_ROWS = 12;
#else
  static constexpr int MAX_ROWS = 3;
#endif
  static ptrdiff_t block_size(int k) { return ptrdiff_t(k) * BLOCK; }
  template <int ROWS, class Number>
  static void sums(const Number* w, const Number* x, ptrdiff_t x_stride, int k_padded, const Stream& stream,
                   fnv (*total)[BLOCK_VECTORS]) {
    const Number* rows[ROWS];
    for (int r = 0; r < ROWS; ++r) rows[r] = x + r * x_stride;
    for (int k = 0; k < k_padded; k += Format::STEP) {
      stream.ask<Format::STEP * BLOCK * int(sizeof(Number))>(w + ptrdiff_t(k) * BLOCK);
      Format::step(w + ptrdiff_t(k) * BLOCK, rows, k, total, ROWS);
    }
  }
};

struct Fp32 : Stepwise<Fp32> {  // one input per step
  typedef float Weight;
  typedef float Input;
  static constexpr int STEP = 1;
  static inline void step(const float* w, const float* const* x, int k, fnv (*acc)[BLOCK_VECTORS], int rows) {
    for (int v = 0; v < BLOCK_VECTORS; ++v) {
      const fnv weights = load_lanes(w + LANES * v);
      for (int r = 0; r < rows; ++r) acc[r][v] = fused(x[r][k], weights, acc[r][v]);
    }
  }
};

struct Bf16 : Stepwise<Bf16> {  // two inputs per step, adjacent in a 32-bit lane
  typedef uint16_t Weight;
  typedef uint16_t Input;
  static constexpr int STEP = 2;
  static inline void step(const uint16_t* w, const uint16_t* const* x, int k, fnv (*acc)[BLOCK_VECTORS], int rows) {
    for (int r = 0; r < rows; ++r) {
      uint32_t pair;
      std::memcpy(&pair, x[r] + k, 4);
#if defined(__AVX512BF16__)
      const __m512bh xb = (__m512bh)_mm512_set1_epi32(int(pair));
      acc[r][0] = (f16v)_mm512_dpbf16_ps((__m512)acc[r][0], (__m512bh)_mm512_loadu_si512(w), xb);
      acc[r][1] = (f16v)_mm512_dpbf16_ps((__m512)acc[r][1], (__m512bh)_mm512_loadu_si512(w + 32), xb);
#else
      const float lo = from_bf16(uint16_t(pair)), hi = from_bf16(uint16_t(pair >> 16));
      for (int v = 0; v < BLOCK_VECTORS; ++v) {
        const unv raw = *reinterpret_cast<const unv*>(w + 2 * LANES * v);
        acc[r][v] = fused(lo, (fnv)(raw << 16), acc[r][v]);
        acc[r][v] = fused(hi, (fnv)(raw & 0xffff0000u), acc[r][v]);
      }
#endif
    }
  }
};

// Store one row's sums of a block, plus bias; `add`: add them to the output instead (the residual connection).
inline void store_row(const float* sums, float* row, int width, const float* bias, bool add) {
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

// ROWS rows times one block.
template <class Format, int ROWS>
void block_rows(const typename Format::Weight* w, const typename Format::Input* x, ptrdiff_t x_stride, int k_padded,
                const Stream& stream, float* y, ptrdiff_t y_stride, int width, const float* bias, bool add) {
  fnv acc[ROWS][BLOCK_VECTORS] = {};
  Format::template sums<ROWS>(w, x, x_stride, k_padded, stream, acc);
  for (int r = 0; r < ROWS; ++r) {
    float out[BLOCK];
    std::memcpy(out, acc[r], sizeof out);
    store_row(out, y + r * y_stride, width, bias, add);
  }
}

inline int num_blocks(int outputs) { return (outputs + BLOCK - 1) / BLOCK; }

// `rows` rows, at most ROWS, times one block, which is read once.
template <class Format, int ROWS = Format::MAX_ROWS>
void block_of(int rows, const typename Format::Weight* w, const typename Format::Input* x, ptrdiff_t x_stride,
              int k_padded, const Stream& stream, float* y, ptrdiff_t y_stride, int width, const float* bias,
              bool add) {
  if constexpr (ROWS > 1)
    if (rows < ROWS)
      return block_of<Format, ROWS - 1>(rows, w, x, x_stride, k_padded, stream, y, y_stride, width, bias, add);
  block_rows<Format, ROWS>(w, x, x_stride, k_padded, stream, y, y_stride, width, bias, add);
}

// From this number of rows on, a block of weights of less than eight bits is unpacked once for all of them; measured.
#if defined(__AVX512F__)
constexpr int UNPACKED_FROM_ROWS = 24;
#else
constexpr int UNPACKED_FROM_ROWS = 16;
#endif

// Bits of a weight of such a format; 0: another format.
template <class Format>
constexpr int UNPACKED_BITS = 0;
template <int BITS>
constexpr int UNPACKED_BITS<Grouped<BITS>> = BITS < 8 ? BITS : 0;

// `rows` rows times blocks [from, to).
template <class Format>
void linear_blocks(const typename Format::Input* x, ptrdiff_t x_stride, int rows, const typename Format::Weight* w,
                   int k_padded, int outputs, const Stream& stream, float* y, const float* bias, bool add, int from,
                   int to) {
  for (int b = from; b < to; ++b) {
    const int first = b * BLOCK, width = outputs - first < BLOCK ? outputs - first : BLOCK;
    const typename Format::Weight* wb = w + Format::block_size(k_padded) * b;
    const float* bb = bias ? bias + first : nullptr;
    int parts = (rows + Format::MAX_ROWS - 1) / Format::MAX_ROWS;
    for (int r = 0, n; r < rows; r += n, --parts) {
      n = (rows - r + parts - 1) / parts;
      const auto multiply = [&](auto format, const auto* block) {
        block_of<decltype(format)>(n, block, x + r * x_stride, x_stride, k_padded, stream,
                                   y + ptrdiff_t(r) * outputs + first, outputs, width, bb, add);
      };
      if constexpr (UNPACKED_BITS<Format> != 0)
        if (rows >= UNPACKED_FROM_ROWS) {
          constexpr int BITS = UNPACKED_BITS<Format>;
          static thread_local Buffer<UnpackedGroup<BITS>> buffer;
          const UnpackedBlock<BITS> block{wb, buffer.at_least(size_t(k_padded))};
          if (r == 0)
            multiply(ManyRows<BITS, Reads::PACKED_AND_UNPACKS>{}, &block);
          else
            multiply(ManyRows<BITS, Reads::UNPACKED>{}, &block);
          continue;
        }
      multiply(Format{}, wb);
    }
  }
}

}  // namespace
