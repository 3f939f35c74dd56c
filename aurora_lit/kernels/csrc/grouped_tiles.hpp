// The grouped formats on Intel's matrix tiles (AMX), faster than grouped.hpp from GROUPED_TILES_MIN_ROWS rows on. An
// input consists of two signed bytes (INPUT_STEP), so a product is two products of bytes. The sums are the same
// integers as in grouped.hpp, added over groups in the same order, so both give the same bits. Source of the
// instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2, TDPBSUD.
#pragma once

#include "grouped.hpp"
#include "bf16_tiles.hpp"

#if defined(AURORA_GROUPED_TILES)

namespace {

constexpr int GROUPED_TILES_MIN_ROWS = 6;
constexpr int WEIGHT_TILE_ROWS = GROUP / 4;  // rows of a tile of weights: four inputs each

// Tiles 4 and 5 hold high and low bytes of the inputs. With 8 bits, 0 and 1 are sums of high bytes for the two halves
// of a block, 2 and 3 sums of low bytes, 6 and 7 the weights. With 4 bits, 0 and 1 are the sums for the two halves, 2
// and 3 the weights, 6 and 7 the weights times the step.
template <int BITS>
inline void configure_grouped_tiles(int rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool inputs = tile == 4 || tile == 5, weights = tile > 5 || (BITS == 4 && (tile == 2 || tile == 3));
    config.row_bytes[tile] = inputs ? GROUP : 64;
    config.rows[tile] = uint8_t(weights ? WEIGHT_TILE_ROWS : rows);
  }
  _tile_loadconfig(&config);
}

inline void load_weights(const WeightGroup<8>& weights) {
  _tile_loadd(6, weights.words[0], 64);
  _tile_loadd(7, weights.words[1], 64);
}

inline void load_weights(const WeightGroup<4>& weights) {
  alignas(64) u16v once[2][WEIGHT_TILE_ROWS], times_step[2][WEIGHT_TILE_ROWS];
  for (int v = 0; v < 2; ++v)
    for (int line = 0; line < WEIGHT_TILE_ROWS / 2; ++line) {
      const u16v both = *reinterpret_cast<const u16v*>(weights.words[v][line]);
      once[v][2 * line] = both & 0x0f0f0f0fu;
      once[v][2 * line + 1] = (both >> 4) & 0x0f0f0f0fu;
      times_step[v][2 * line] = (both << 4) & 0xf0f0f0f0u;
      times_step[v][2 * line + 1] = both & 0xf0f0f0f0u;
    }
  __asm__ volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
  _tile_loadd(2, once[0], 64);
  _tile_loadd(3, once[1], 64);
  _tile_loadd(6, times_step[0], 64);
  _tile_loadd(7, times_step[1], 64);
}

// One group's integer sums for up to 16 rows and one block, and the scales that convert them to floats.
template <int BITS>
struct GroupSums {
  static constexpr bool HAS_MIN = WeightGroup<BITS>::HAS_MIN;
  alignas(64) i16v sums[BITS == 4 ? 2 : 4][TILE_ROWS];
  f16v scales[2], mins[2];
  const InputGroup* inputs;
  f16v* totals;
  int rows = 0;

  void multiply(ptrdiff_t stride) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, inputs->high, stride);
    _tile_loadd(5, inputs->low, stride);
    if (BITS == 4) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(0, 5, 2);
      _tile_dpbsud(1, 5, 3);
    } else {
      _tile_zero(2);
      _tile_zero(3);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
      _tile_stored(2, sums[BITS / 4], 64);
      _tile_stored(3, sums[BITS / 4 + 1], 64);
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
  }
  i16v dots(int row, int half, int32_t start) const {
    return BITS == 4 ? sums[half][row] : (sums[half][row] << 8) + sums[half + BITS / 4][row] + start;
  }
  void add(int groups) const {
    const f16v scale0 = scales[0], scale1 = scales[1], min0 = mins[0], min1 = mins[1];
    const InputGroup* __restrict row = inputs;
    f16v* __restrict total = totals;
    for (int i = 0; i < rows; ++i, row += groups, total += 2) {
      const int32_t start = HAS_MIN ? 0 : -128 * row->sum;
      const f16v next0 = add_group<HAS_MIN>(total[0], dots(i, 0, start), scale0, min0, *row);
      total[1] = add_group<HAS_MIN>(total[1], dots(i, 1, start), scale1, min1, *row);
      total[0] = next0;
    }
  }
};

// `rows` rows times blocks [from, to). With more than 16 rows, x is padded to whole tiles of rows.
template <int BITS>
void linear_grouped_tiles(const InputGroup* x, int groups, int rows, const WeightGroup<BITS>* w, int outputs,
                        const Stream& stream, float* y, const float* bias, bool add, int from, int to) {
  const ptrdiff_t stride = ptrdiff_t(groups) * ptrdiff_t(sizeof(InputGroup));
  static thread_local Buffer<float> buffer;
  f16v* const totals = reinterpret_cast<f16v*>(buffer.at_least(size_t(rows) * BLOCK));
  GroupSums<BITS> both[2];  // while the tiles compute one, the other is added to the totals
  int turn = 0;
  for (int b = from; b < to; ++b) {
    const int first = b * BLOCK, width = outputs - first < BLOCK ? outputs - first : BLOCK;
    for (int i = 0; i < rows * 2; ++i) totals[i] = f16v{};
    for (int g = 0; g < groups; ++g) {
      const WeightGroup<BITS>& weights = w[ptrdiff_t(b) * groups + g];
      stream.ask<sizeof(weights)>(&weights);
      load_weights(weights);
      f16v scales[2], mins[2] = {};
      for (int v = 0; v < 2; ++v) {
        scales[v] = from_fp16(weights.scales + 16 * v);
        if (GroupSums<BITS>::HAS_MIN) mins[v] = from_fp16(weights.mins + 16 * v);
      }
      for (int r = 0; r < rows; r += TILE_ROWS, turn ^= 1) {
        GroupSums<BITS>& made = both[turn];
        made.inputs = x + ptrdiff_t(r) * groups + g, made.totals = totals + 2 * r;
        made.rows = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
        for (int v = 0; v < 2; ++v) made.scales[v] = scales[v], made.mins[v] = mins[v];
        made.multiply(stride);
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
