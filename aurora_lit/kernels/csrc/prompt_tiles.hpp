// Products for the rows of prompts on Intel's matrix tiles (AMX), for bf16 and grouped weights. A prompt has many rows,
// so that a block of weights is unpacked once to bf16 and multiplied by all of them. Inputs are rounded to bf16 too,
// unlike what grouped.hpp does for decoding rows: which of the two computes a row depends on its kind alone, never on
// the number of rows. Each output is summed over the inputs in one order, so a row's bits depend neither on the chunks
// in which its prompt is read nor on other rows. With bf16 weights they equal those of bf16_tiles.hpp, but not where an
// output is added to what is there: here the sum begins with that, there it is added last.
#pragma once

#include "bf16_tiles.hpp"
#include "grouped.hpp"

#if defined(AURORA_TILES)

namespace {

// Inputs whose weights stay in the first-level cache while all rows are multiplied.
constexpr int PANEL_INPUTS = 512;

// A block of grouped weights as bf16, in the layout of packed bf16 weights.
template <int BITS>
inline void unpack_to_bf16(const WeightGroup<BITS>* weights, int groups, uint16_t* to) {
  typedef WeightGroup<BITS> Group;
  constexpr int SCALE_LINES = LINES / Group::SCALES;
  for (int g = 0; g < groups; ++g, ++weights, to += GROUP * BLOCK)
    for (int part = 0; part < 2 * Group::SCALES; ++part) {
      const int v = part % 2, scale = part / 2;
      const f16v scales = from_fp16(weights->scales[scale] + 16 * v);
      const f16v offsets = Group::HAS_MIN ? from_fp16(weights->mins + 16 * v) : -float(Group::OFFSET) * scales;
#pragma GCC unroll 8
      for (int i = 0; i < SCALE_LINES; ++i) {
        const int line = scale * SCALE_LINES + i;
        const u16v bytes = weights->template bytes<u16v>(16 * v, line);
        for (int n = 0; n < 2; ++n) {  // see LaneOrder
          const i16v low = (i16v)((bytes >> (8 * n)) & 0xffu), high = (i16v)((bytes >> (8 * n + 16)) & 0xffu);
          const u16v even = (u16v)fused(__builtin_convertvector(low, f16v), scales, offsets) + 0x8000u;
          const u16v odd = (u16v)fused(__builtin_convertvector(high, f16v), scales, offsets) + 0x8000u;
          const u16v pair = (even >> 16) | (odd & 0xffff0000u);
          std::memcpy(to + LANE_ORDER.input[4 * line + n] * BLOCK + 32 * v, &pair, sizeof pair);
        }
      }
    }
}

// Outputs of 16 rows in the caller's memory, or in a copy if fewer rows are left: tiles are stored whole.
struct TileOutput {
  float* y;
  ptrdiff_t stride;
  int count;
  float copy[TILE_ROWS * BLOCK];

  float* at() { return count < TILE_ROWS ? copy : y; }
  ptrdiff_t bytes() const { return (count < TILE_ROWS ? BLOCK : stride) * 4; }
  void begin(float* first, ptrdiff_t row_stride, int rows, bool add) {
    y = first, stride = row_stride, count = rows < 0 ? 0 : rows < TILE_ROWS ? rows : TILE_ROWS;
    for (int r = 0; add && count < TILE_ROWS && r < count; ++r)
      std::memcpy(copy + r * BLOCK, y + r * stride, BLOCK * sizeof(float));
  }
  void end() const {
    for (int r = 0; count < TILE_ROWS && r < count; ++r)
      std::memcpy(y + r * stride, copy + r * BLOCK, BLOCK * sizeof(float));
  }
};

// y [rows, BLOCK] = `rows` rows times one whole block; `add`: the sums begin with y. The thread's tiles are configured
// for 16 rows. x: bf16 inputs at the offsets of tile_place, whole tiles of rows. w: bf16 weights of the block.
inline void multiply_whole_block(const uint16_t* x, int k_padded, int rows, const uint16_t* w, float* y,
                                 ptrdiff_t stride, bool add) {
  constexpr int TILE_SIZE = TILE_ROWS * TILE_INPUTS, X_BYTES = TILE_INPUTS * 2, W_BYTES = BLOCK * 2 * 2;
  alignas(64) TileOutput outputs[2];
  const int panels = (k_padded + PANEL_INPUTS - 1) / PANEL_INPUTS, tiles = k_padded / TILE_INPUTS;
  for (int panel = 0; panel < panels; ++panel) {
    const int from = tiles * panel / panels, to = tiles * (panel + 1) / panels;
    for (int r = 0; r < rows; r += 2 * TILE_ROWS) {
      const uint16_t* x0 = x + ptrdiff_t(r) * k_padded + from * TILE_SIZE;
      const bool both = rows - r > TILE_ROWS;
      const uint16_t* x1 = both ? x0 + TILE_ROWS * k_padded : x0;
      for (int half = 0; half < 2; ++half) {
        const int row = r + half * TILE_ROWS;
        // Only the last rows have copies, which therefore last from panel to panel.
        outputs[half].begin(y + row * stride, stride, rows - row, add && panel == 0);
      }
      float *y0 = outputs[0].at(), *y1 = outputs[1].at();
      const ptrdiff_t bytes0 = outputs[0].bytes(), bytes1 = outputs[1].bytes();
      __asm__ volatile("" ::: "memory");
      if (panel || add) {
        _tile_loadd(0, y0, bytes0);
        _tile_loadd(1, y0 + 16, bytes0);
        _tile_loadd(2, y1, bytes1);
        _tile_loadd(3, y1 + 16, bytes1);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int t = from; t < to; ++t, x0 += TILE_SIZE, x1 += TILE_SIZE) {
        const uint16_t* at = w + ptrdiff_t(t) * TILE_INPUTS * BLOCK;
        _tile_loadd(6, at, W_BYTES);
        _tile_loadd(7, at + BLOCK, W_BYTES);
        _tile_loadd(4, x0, X_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!both) continue;
        _tile_loadd(5, x1, X_BYTES);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, y0, bytes0);
      _tile_stored(1, y0 + 16, bytes0);
      if (both) {
        _tile_stored(2, y1, bytes1);
        _tile_stored(3, y1 + 16, bytes1);
      }
      if (panel + 1 < panels) continue;
      outputs[0].end();
      outputs[1].end();
    }
  }
}

// y [rows, width] = `rows` rows times one block, plus bias; `add`: plus y.
inline void multiply_rows(const uint16_t* x, int k_padded, int rows, const uint16_t* w, float* y, ptrdiff_t stride,
                          int width, const float* bias, bool add) {
  if (width == BLOCK && !bias) return multiply_whole_block(x, k_padded, rows, w, y, stride, add);
  static thread_local Buffer<float> buffer;
  float* sums = buffer.at_least(size_t(rows) * BLOCK);
  multiply_whole_block(x, k_padded, rows, w, sums, BLOCK, false);
  for (int r = 0; r < rows; ++r) store_row(sums + r * BLOCK, y + r * stride, width, bias, add);
}

}  // namespace
#endif
