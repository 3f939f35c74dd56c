// Grouped weights of 4 bits on Intel's matrix tiles (AMX), faster than grouped.hpp from FOUR_BIT_TILES_MIN_ROWS rows on. An
// input consists of two signed bytes (INPUT_STEP), so the product of a group is one product of bytes over twice as many
// inputs: [high, low] times [16 q, q]. The sums are the same integers as in grouped.hpp, scaled and added over groups in
// the same order, so both give the same bits. Source of the instruction: Intel 64 and IA-32 Architectures Software
// Developer's Manual, vol. 2, TDPBSUD.
#pragma once

#include "grouped.hpp"
#include "bf16_tiles.hpp"

#if defined(AURORA_GROUPED_TILES)

namespace {

constexpr int FOUR_BIT_TILES_MIN_ROWS = 4;  // fewer rows are faster in vectors
constexpr int HALF = BLOCK / 2;            // outputs of one tile

// One group of inputs of up to 16 rows, as a tile reads it.
struct alignas(64) TileInputs {
  int8_t bytes[TILE_ROWS][2 * GROUP];  // high bytes, then low bytes
  float scale[TILE_ROWS], scaled_sum[TILE_ROWS];

  void set(int row, const InputGroup& group) {
    split_bytes<4>(group, bytes[row], bytes[row] + GROUP);
    scale[row] = group.scale, scaled_sum[row] = group.scaled_sum;
  }
};

// The weights of one group and half a block, as a tile reads them: times the step, then once.
struct alignas(64) TileWeights {
  u16v lines[TILE_ROWS];
};

// A tile is loaded this many steps after its weights were stored, and its sums are read this many steps after they were:
// a processor cannot forward either from its store buffer.
constexpr int UNPACKED_AHEAD = 3, SUMS_BEHIND = 2;

inline __attribute__((always_inline)) void unpack_half(const WeightGroup<4>& weights, int half, TileWeights& to) {
  for (int line = 0; line < BLOCK / 8; ++line) {
    const u16v both = *reinterpret_cast<const u16v*>(weights.words[half][line]);
    to.lines[2 * line] = (both << 4) & 0xf0f0f0f0u;
    to.lines[2 * line + 1] = both & 0xf0f0f0f0u;
    to.lines[8 + 2 * line] = both & 0x0f0f0f0fu;
    to.lines[9 + 2 * line] = (both >> 4) & 0x0f0f0f0fu;
  }
}

// Two sets of registers in turn, so that one product need not wait for the other. GCC does not know that a tile load
// reads memory.
inline __attribute__((always_inline)) void multiply_tile(int step, const TileWeights& weights, const TileInputs& inputs,
                                                         i16v* sums) {
  __asm__ volatile("" ::: "memory");
  if (step & 1) {
    _tile_zero(1);
    _tile_loadd(7, weights.lines, 64);
    _tile_loadd(5, inputs.bytes, 64);
    _tile_dpbsud(1, 5, 7);
    _tile_stored(1, sums, 64);
  } else {
    _tile_zero(0);
    _tile_loadd(6, weights.lines, 64);
    _tile_loadd(4, inputs.bytes, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_stored(0, sums, 64);
  }
}

// As add_group, for the rows of a tile.
template <int ROWS>
inline __attribute__((always_inline)) void add_sums(f16v* totals, const WeightGroup<4>& weights, int half, const i16v* sums,
                                                    const TileInputs& inputs) {
  const f16v scales = from_fp16(weights.scales + HALF * half), mins = from_fp16(weights.mins + HALF * half);
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    totals[r] += __builtin_convertvector(sums[r], f16v) * (scales * inputs.scale[r]);
    totals[r] += mins * inputs.scaled_sum[r];
  }
}

// What a half block's totals become.
struct HalfOutput {
  float* y;  // of the first row
  int outputs, width;
  const float* bias;
  bool add;

  inline __attribute__((always_inline)) void put(const f16v& total, int row) const {
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

  HalfOutput half_output(int block, int half, int first_row) const {
    const int first = block * BLOCK + half * HALF, left = outputs - first;
    return {y + ptrdiff_t(first_row) * outputs + first, outputs, left < 0 ? 0 : left < HALF ? left : HALF,
            bias ? bias + first : nullptr, add};
  }
};

// Up to 16 rows: weights are unpacked into a short ring while the tiles multiply and the totals lie in registers.
template <int ROWS>
__attribute__((noinline)) void few_rows(const FourBitProduct& p, const Stream& stream, int from, int to) {
  static thread_local TileWeights ring[8];
  alignas(64) i16v sums[4][TILE_ROWS];
  const int groups = p.groups, steps = (to - from) * 2 * groups;
  struct Place {  // block, half, group of a step
    const WeightGroup<4>* block;
    int half = 0, group = 0;
    inline __attribute__((always_inline)) bool advance(int groups) {  // true where a half ended
      if (++group < groups) return false;
      group = 0;
      if (half) block += groups;
      half ^= 1;
      return true;
    }
  };
  const WeightGroup<4>* const begin = p.w + ptrdiff_t(from) * groups;
  Place unpacked{begin}, multiplied{begin}, added{begin};
  int block = from;
  f16v totals[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) totals[r] = f16v{};
  for (int i = 0; i < UNPACKED_AHEAD && i < steps; ++i) {
    unpack_half(unpacked.block[unpacked.group], unpacked.half, ring[i]);
    unpacked.advance(groups);
  }
  for (int i = 0; i < steps + SUMS_BEHIND; ++i) {
    if (i < steps) {
      multiply_tile(i, ring[i & 7], p.x[multiplied.group], sums[i & 3]);
      multiplied.advance(groups);
    }
    if (i + UNPACKED_AHEAD < steps) {
      const WeightGroup<4>& weights = unpacked.block[unpacked.group];
      if (!unpacked.half) stream.ask<sizeof(WeightGroup<4>)>(&weights);
      unpack_half(weights, unpacked.half, ring[(i + UNPACKED_AHEAD) & 7]);
      unpacked.advance(groups);
    }
    if (i < SUMS_BEHIND) continue;
    const int half = added.half;
    add_sums<ROWS>(totals, added.block[added.group], half, sums[(i - SUMS_BEHIND) & 3], p.x[added.group]);
    if (!added.advance(groups)) continue;
    const HalfOutput output = p.half_output(block, half, 0);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      if (r < p.rows) output.put(totals[r], r);
      totals[r] = f16v{};
    }
    block += half;
  }
}

// More rows: a half block is unpacked once for all tiles of rows.
__attribute__((noinline)) inline void many_rows(const FourBitProduct& p, const Stream& stream, int from, int to) {
  static thread_local Buffer<TileWeights> buffer;
  TileWeights* const panel = buffer.at_least(size_t(p.groups));
  alignas(64) i16v sums[4][TILE_ROWS];
  for (int b = from; b < to; ++b)
    for (int half = 0; half < 2; ++half) {
      const WeightGroup<4>* weights = p.w + ptrdiff_t(b) * p.groups;
      for (int g = 0; g < p.groups; ++g) {
        if (!half) stream.ask<sizeof(WeightGroup<4>)>(weights + g);
        unpack_half(weights[g], half, panel[g]);
      }
      for (int first = 0; first < p.rows; first += TILE_ROWS) {
        const TileInputs* x = p.x + ptrdiff_t(first / TILE_ROWS) * p.groups;
        f16v totals[TILE_ROWS] = {};
        for (int i = 0; i < p.groups + SUMS_BEHIND; ++i) {
          if (i < p.groups) multiply_tile(i, panel[i], x[i], sums[i & 3]);
          const int g = i - SUMS_BEHIND;
          if (g >= 0) add_sums<TILE_ROWS>(totals, weights[g], half, sums[g & 3], x[g]);
        }
        const HalfOutput output = p.half_output(b, half, first);
        const int rows = p.rows - first < TILE_ROWS ? p.rows - first : TILE_ROWS;
        for (int r = 0; r < rows; ++r) output.put(totals[r], r);
      }
    }
}

// With the fewest rows that hold all: their own number would be a function each, and minutes of compiling.
template <int ROWS, int... MORE>
void few_rows_of(const FourBitProduct& p, const Stream& stream, int from, int to) {
  if constexpr (sizeof...(MORE) > 0)
    if (p.rows > ROWS) return few_rows_of<MORE...>(p, stream, from, to);
  few_rows<ROWS>(p, stream, from, to);
}

// `rows` rows times blocks [from, to); the thread's tiles are configured for min(rows, 16) rows by configure_tiles.
// x: [tiles of rows][groups].
inline void linear_four_bit_tiles(const TileInputs* x, int groups, int rows, const WeightGroup<4>* w, int outputs,
                                  const Stream& stream, float* y, const float* bias, bool add, int from, int to) {
  const FourBitProduct product{x, groups, rows, w, outputs, y, bias, add};
  if (rows <= TILE_ROWS)
    few_rows_of<4, 5, 6, 8, 12, 16>(product, stream, from, to);
  else
    many_rows(product, stream, from, to);
}

}  // namespace
#endif
