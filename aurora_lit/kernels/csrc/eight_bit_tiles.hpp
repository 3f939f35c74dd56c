// Grouped weights of 8 bits on Intel's matrix tiles (AMX), faster than grouped.hpp from EIGHT_BIT_TILES_MIN_ROWS rows
// on: the product of a group is one product of bytes. The sums are the same integers as in grouped.hpp, added over
// groups in the same order, so both give the same bits. Source of the instructions: Intel 64 and IA-32 Architectures
// Software Developer's Manual, vol. 2, TDPBSUD.
#pragma once

#include "grouped.hpp"
#include "bf16_tiles.hpp"

#if defined(AURORA_GROUPED_TILES)

namespace {

constexpr int EIGHT_BIT_TILES_MIN_ROWS = 6;

// Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 the weights of the two halves of a block, whose rows hold four inputs
// each.
inline void configure_byte_tiles(int rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = tile == 4 || tile == 5 ? GROUP : 64;
    config.rows[tile] = uint8_t(tile > 5 ? GROUP / 4 : rows);
  }
  load_tile_config(config);
}

// One group's integer sums for up to 16 rows and one block, and the scales that convert them to floats.
struct GroupSums {
  alignas(64) i16v sums[2][TILE_ROWS];
  f16v scales[2];
  const InputGroup* inputs;
  f16v* totals;
  int rows = 0;

  void multiply(const WeightGroup<8>& weights, ptrdiff_t stride) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(6, weights.words[0], 64);
    _tile_loadd(7, weights.words[1], 64);
    _tile_loadd(4, inputs->values, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
  }
  i16v dots(int row, int half, int32_t start) const { return sums[half][row] + start; }
  void add(int groups) const {
    const f16v scale0 = scales[0], scale1 = scales[1];
    const InputGroup* __restrict row = inputs;
    f16v* __restrict total = totals;
    for (int i = 0; i < rows; ++i, row += groups, total += 2) {
      const int32_t start = -128 * row->sum;
      const f16v next0 = add_group<false>(total[0], dots(i, 0, start), scale0, f16v{}, *row);
      total[1] = add_group<false>(total[1], dots(i, 1, start), scale1, f16v{}, *row);
      total[0] = next0;
    }
  }
};

// `rows` rows times blocks [from, to). With more than 16 rows, x is padded to whole tiles of rows.
inline void linear_eight_bit_tiles(const InputGroup* x, int groups, int rows, const WeightGroup<8>* w, int outputs,
                                   const Stream& stream, float* y, const float* bias, bool add, int from, int to) {
  const ptrdiff_t stride = ptrdiff_t(groups) * ptrdiff_t(sizeof(InputGroup));
  static thread_local Buffer<float> buffer;
  f16v* const totals = reinterpret_cast<f16v*>(buffer.at_least(size_t(rows) * BLOCK));
  GroupSums both[2];  // while the tiles compute one, the other is added to the totals
  int turn = 0;
  for (int b = from; b < to; ++b) {
    const int first = b * BLOCK, width = outputs - first < BLOCK ? outputs - first : BLOCK;
    for (int i = 0; i < rows * 2; ++i) totals[i] = f16v{};
    for (int g = 0; g < groups; ++g) {
      const WeightGroup<8>& weights = w[ptrdiff_t(b) * groups + g];
      stream.ask<sizeof(weights)>(&weights);
      const f16v scales[2] = {from_fp16(weights.scales), from_fp16(weights.scales + 16)};
      for (int r = 0; r < rows; r += TILE_ROWS, turn ^= 1) {
        GroupSums& made = both[turn];
        made.inputs = x + ptrdiff_t(r) * groups + g, made.totals = totals + 2 * r;
        made.rows = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
        for (int v = 0; v < 2; ++v) made.scales[v] = scales[v];
        made.multiply(weights, stride);
        both[turn ^ 1].add(groups);
      }
    }
    both[turn ^ 1].add(groups);
    both[turn ^ 1].rows = 0;
    for (int r = 0; r < rows; ++r) {
      float out[BLOCK];
      std::memcpy(out, totals + r * 2, sizeof out);
      store_row(out, y + ptrdiff_t(r) * outputs + first, width, bias ? bias + first : nullptr, add);
    }
  }
}

}  // namespace
#endif
