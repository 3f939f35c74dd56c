// Grouped weights of 4 bits on Intel's matrix tiles (AMX), faster than grouped.hpp from FOUR_BIT_TILES_MIN_ROWS rows
// on: the product of a group is one product of bytes. The sums are the same integers as in grouped.hpp, scaled and added
// over groups in the same order, so both give the same bits. Source of the instruction: Intel 64 and IA-32
// Architectures Software Developer's Manual, vol. 2, TDPBSUD.
#pragma once

#include <utility>

#include "eight_bit_tiles.hpp"

#if defined(AURORA_GROUPED_TILES)

namespace {

constexpr int FOUR_BIT_TILES_MIN_ROWS = 7;  // fewer rows are faster in vectors; measured
constexpr int HALF = BLOCK / 2;            // outputs of one tile

// One group of inputs of up to 16 rows, as a tile reads it.
struct alignas(64) TileInputs {
  int8_t bytes[TILE_ROWS][GROUP];
  float scale[TILE_ROWS], scaled_sum[TILE_ROWS];

  void set(int row, const InputGroup& group) {
    std::memcpy(bytes[row], group.values, GROUP);
    scale[row] = group.scale, scaled_sum[row] = group.scaled_sum;
  }
};

// The weights of one group and half a block, as a tile reads them.
struct alignas(64) TileWeights {
  u16v lines[GROUP / 4];
};

// The weights of this many groups are unpacked ahead, and sums are added this many groups behind: a processor cannot
// forward from its store buffer to a tile load, nor from a tile store.
constexpr int UNPACKED_AHEAD = 3, ADDED_BEHIND = 3, RING = 4;

inline __attribute__((always_inline)) void unpack_half(const WeightGroup<4>& weights, int half, TileWeights& to) {
  for (int line = 0; line < BLOCK / 8; ++line) {
    const u16v both = *reinterpret_cast<const u16v*>(weights.words[half][line]);
    for (int n = 0; n < 2; ++n) to.lines[2 * line + n] = Grouped<4>::piece(both, n);
  }
}

// Products of group number `step` for both halves of a block. Two sets of registers take turns, so that a product need
// not wait for the one before. GCC does not know that a tile load reads memory.
inline __attribute__((always_inline)) void multiply_group(int step, const TileWeights* weights, const TileInputs& inputs) {
  __asm__ volatile("" ::: "memory");
  if (step & 1) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(5, inputs.bytes, GROUP);
    _tile_loadd(6, weights[0].lines, 64);
    _tile_dpbsud(2, 5, 6);
    _tile_loadd(7, weights[1].lines, 64);
    _tile_dpbsud(3, 5, 7);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, inputs.bytes, GROUP);
    _tile_loadd(6, weights[0].lines, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, weights[1].lines, 64);
    _tile_dpbsud(1, 4, 7);
  }
}

inline __attribute__((always_inline)) void store_group(int step, i16v (*sums)[TILE_ROWS]) {
  if (step & 1) {
    _tile_stored(2, sums[0], 64);
    _tile_stored(3, sums[1], 64);
  } else {
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
  }
}

// The totals of a tile of rows. Their indices are template parameters: GCC would leave an indexed array in memory.
template <class Rows>
struct Totals;
template <size_t... R>
struct Totals<std::index_sequence<R...>> {
  f16v of[sizeof...(R)];

  inline __attribute__((always_inline)) void clear() { ((of[R] = f16v{}), ...); }
  // As add_group.
  inline __attribute__((always_inline)) void add(const WeightGroup<4>& weights, int half, const i16v* sums,
                                                 const TileInputs& inputs) {
    const f16v scales = from_fp16(weights.scales + HALF * half), mins = from_fp16(weights.mins + HALF * half);
    ((of[R] = fused(__builtin_convertvector(sums[R], f16v), scales * inputs.scale[R], of[R])), ...);
    ((of[R] = fused(mins, inputs.scaled_sum[R], of[R])), ...);
  }
  template <class Each>
  inline __attribute__((always_inline)) void each(Each use) const {
    (use(int(R), of[R]), ...);
  }
};

// What a half block's totals become.
struct HalfOutput {
  float* y;  // of the first row
  int outputs, width;
  const float* bias;
  bool add;

  inline __attribute__((always_inline)) void put(f16v total, int row) const {
    float* to = y + ptrdiff_t(row) * outputs;
    if (width == HALF) {
      f16v out = total;
      if (add) out += *reinterpret_cast<const f16v*>(to);
      if (bias) out += *reinterpret_cast<const f16v*>(bias);
      std::memcpy(to, &out, sizeof out);
      return;
    }
    for (int i = 0; i < width; ++i) {
      const float out = add ? to[i] + total[i] : total[i];
      to[i] = bias ? out + bias[i] : out;
    }
  }
};

struct FourBitProduct {
  const TileInputs* x;
  int groups, rows;
  const WeightGroup<4>* w;
  int outputs;
  float* y;
  const float* bias;
  bool add;

  HalfOutput half_output(int block, int half) const {
    const int first = block * BLOCK + half * HALF, left = outputs - first;
    return {y + first, outputs, left < 0 ? 0 : left < HALF ? left : HALF,
            bias ? bias + first : nullptr, add};
  }
};

// At most ROWS rows, of one tile. In each step the tiles multiply one group, while the vector units unpack a later one
// and add the sums of an earlier one to the totals, which stay in registers.
template <int ROWS>
__attribute__((noinline)) void multiply_tile_rows(const FourBitProduct& p, const Stream& stream, int from, int to) {
  static thread_local TileWeights ring[RING][2];
  alignas(64) i16v sums[RING][2][TILE_ROWS];
  const int groups = p.groups, steps = (to - from) * groups;
  const WeightGroup<4>* const w = p.w + ptrdiff_t(from) * groups;
  const auto unpack = [&](int i) {
    unpack_half(w[i], 0, ring[i % RING][0]);
    unpack_half(w[i], 1, ring[i % RING][1]);
  };
  Totals<std::make_index_sequence<ROWS>> totals[2];
  totals[0].clear(), totals[1].clear();
  int multiplied = 0, added = 0, block = from;  // the inputs' groups of these two steps, and the block of the latter
  for (int i = 0; i < UNPACKED_AHEAD && i < steps; ++i) unpack(i);
  for (int i = 0; i < steps + ADDED_BEHIND; ++i) {
    if (i + UNPACKED_AHEAD < steps) {
      stream.ask<sizeof(WeightGroup<4>)>(&w[i + UNPACKED_AHEAD]);
      unpack(i + UNPACKED_AHEAD);
    }
    if (i < steps) {
      multiply_group(i, ring[i % RING], p.x[multiplied]);
      if (++multiplied == groups) multiplied = 0;
    }
    if (i && i <= steps) store_group(i - 1, sums[(i - 1) % RING]);
    const int done = i - ADDED_BEHIND;
    if (done < 0) continue;
    totals[0].add(w[done], 0, sums[done % RING][0], p.x[added]);
    totals[1].add(w[done], 1, sums[done % RING][1], p.x[added]);
    if (++added < groups) continue;
    added = 0;
    for (int half = 0; half < 2; ++half) {
      const HalfOutput output = p.half_output(block, half);
      totals[half].each([&](int r, f16v total) {
        if (r < p.rows) output.put(total, r);
      });
      totals[half].clear();
    }
    ++block;
  }
}

// With the smallest ROWS that holds all: a function for every number of rows would take minutes to compile.
template <int ROWS, int... MORE>
void multiply_fitting(const FourBitProduct& p, const Stream& stream, int from, int to) {
  if constexpr (sizeof...(MORE) > 0)
    if (p.rows > ROWS) return multiply_fitting<MORE...>(p, stream, from, to);
  multiply_tile_rows<ROWS>(p, stream, from, to);
}

// `rows` rows times blocks [from, to); configure_byte_tiles has configured the thread's tiles for min(rows, 16) rows.
// x: [tiles of rows][groups].
inline void linear_four_bit_tiles(const TileInputs* x, int groups, int rows, const WeightGroup<4>* w, int outputs,
                                  const Stream& stream, float* y, const float* bias, bool add, int from, int to) {
  for (int r = 0; r < rows; r += TILE_ROWS, x += groups, y += ptrdiff_t(TILE_ROWS) * outputs) {
    const int count = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
    multiply_fitting<4, 5, 6, 8, 12, 16>(FourBitProduct{x, groups, count, w, outputs, y, bias, add}, stream, from, to);
  }
}

}  // namespace
#endif
