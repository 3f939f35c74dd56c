// Grouped weights on Intel's matrix tiles (AMX), faster than grouped.hpp from GROUPED_TILES_MIN_ROWS rows on: the
// product of the inputs of a scale is one product of bytes. The sums are the same integers as in grouped.hpp, scaled and
// added in the same order, so both give the same bits. Source of the instruction: Intel 64 and IA-32 Architectures
// Software Developer's Manual, vol. 2, TDPBSUD.
#pragma once

#include <utility>

#include "bf16_tiles.hpp"
#include "grouped.hpp"

#if defined(AURORA_GROUPED_TILES)

namespace {

constexpr int GROUPED_TILES_MIN_ROWS = 7;  // fewer rows are faster in vectors; measured
constexpr int HALF = BLOCK / 2;            // outputs of one tile

// Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 the weights of the two halves of a block, whose rows hold four inputs
// each.
template <int BITS>
void configure_byte_tiles(int rows) {
  constexpr int INPUTS = GROUP / WeightGroup<BITS>::SCALES;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = tile == 4 || tile == 5 ? INPUTS : 64;
    config.rows[tile] = uint8_t(tile > 5 ? INPUTS / 4 : rows);
  }
  load_tile_config(config);
}

// One group of inputs of up to 16 rows, as a tile reads it.
struct alignas(64) TileInputs {
  int8_t bytes[TILE_ROWS][GROUP];
  float scale[TILE_ROWS], scaled_sum[TILE_ROWS];
  int32_t sums[TILE_ROWS][2];

  void set(int row, const InputGroup& group) {
    std::memcpy(bytes[row], group.values, GROUP);
    scale[row] = group.scale, scaled_sum[row] = group.scaled_sum;
    std::memcpy(sums[row], group.sums, sizeof group.sums);
  }
};

// The weights of one scale and half a block, as a tile reads them.
struct alignas(64) TileWeights {
  u16v lines[LINES];
};

// The weights of this many steps are unpacked ahead, and sums are added this many steps behind: a processor cannot
// forward from its store buffer to a tile load, nor from a tile store.
constexpr int UNPACKED_AHEAD = 3, ADDED_BEHIND = 3, RING = 4;

template <class Group>
inline __attribute__((always_inline)) void unpack_half(const Group& weights, int scale, int half, TileWeights& to) {
  constexpr int COUNT = LINES / Group::SCALES;
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i) to.lines[i] = weights.template bytes<u16v>(HALF * half, scale * COUNT + i);
}

// Products of step number `step` for both halves of a block. Two sets of registers take turns, so that a product need
// not wait for the one before. GCC does not know that a tile load reads memory.
inline __attribute__((always_inline)) void multiply_step(int step, const void* low, const void* high,
                                                         const int8_t* inputs) {
  __asm__ volatile("" ::: "memory");
  if (step & 1) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(5, inputs, GROUP);
    _tile_loadd(6, low, 64);
    _tile_dpbsud(2, 5, 6);
    _tile_loadd(7, high, 64);
    _tile_dpbsud(3, 5, 7);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, inputs, GROUP);
    _tile_loadd(6, low, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, high, 64);
    _tile_dpbsud(1, 4, 7);
  }
}

inline __attribute__((always_inline)) void store_step(int step, i16v (*sums)[TILE_ROWS]) {
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
  template <class Group>
  inline __attribute__((always_inline)) void add(const Group& weights, int scale, int half, const i16v* sums,
                                                 const TileInputs& inputs) {
    const f16v scales = from_fp16(weights.scales[scale] + HALF * half);
    if constexpr (Group::HAS_MIN) {
      const f16v mins = from_fp16(weights.mins + HALF * half);
      ((of[R] = fused(__builtin_convertvector(sums[R], f16v), scales * inputs.scale[R], of[R])), ...);
      ((of[R] = fused(mins, inputs.scaled_sum[R], of[R])), ...);
    } else {
      const auto offset = [&](size_t r) {
        const int32_t sum = Group::SCALES == 2 ? inputs.sums[r][scale] : inputs.sums[r][0] + inputs.sums[r][1];
        return -Group::OFFSET * sum;
      };
      ((of[R] = fused(__builtin_convertvector(sums[R] + offset(R), f16v), scales * inputs.scale[R], of[R])), ...);
    }
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

// W[i] is group number i of the weight: W is a pointer to WeightGroup, or a class.
template <class W>
struct TileProduct {
  const TileInputs* x;
  int groups, rows;
  W w;
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

// At most ROWS rows, of one tile. In each step the tiles multiply the inputs of one scale, while the vector units unpack
// a later one's weights and add the sums of an earlier one to the totals, which stay in registers.
template <class W, int ROWS>
__attribute__((noinline)) void multiply_tile_rows(const TileProduct<W>& p, const Stream& stream, int from, int to) {
  typedef std::decay_t<decltype(p.w[0])> Group;
  constexpr int SCALES = Group::SCALES;
  static thread_local TileWeights ring[RING][2];
  alignas(64) i16v sums[RING][2][TILE_ROWS];
  const int groups = p.groups, steps = (to - from) * groups * SCALES;
  const W w = p.w + ptrdiff_t(from) * groups;
  const auto unpack = [&](int i) {
    if (i % SCALES == 0) w[i / SCALES].ask(stream);
    if constexpr (Group::IS_BYTES) return;  // tiles read the weights themselves
    unpack_half(w[i / SCALES], i % SCALES, 0, ring[i % RING][0]);
    unpack_half(w[i / SCALES], i % SCALES, 1, ring[i % RING][1]);
  };
  Totals<std::make_index_sequence<ROWS>> totals[2];
  totals[0].clear(), totals[1].clear();
  int multiplied = 0, added = 0, block = from;  // the inputs' groups of these two steps, and the block of the latter
  for (int i = 0; i < UNPACKED_AHEAD && i < steps; ++i) unpack(i);
  for (int i = 0; i < steps + ADDED_BEHIND; ++i) {
    if (i + UNPACKED_AHEAD < steps) unpack(i + UNPACKED_AHEAD);
    if (i < steps) {
      const int8_t* inputs = p.x[multiplied].bytes[0] + i % SCALES * (GROUP / SCALES);
      if constexpr (Group::IS_BYTES)
        multiply_step(i, w[i].words[0], w[i].words[1], inputs);
      else
        multiply_step(i, ring[i % RING][0].lines, ring[i % RING][1].lines, inputs);
      if (i % SCALES == SCALES - 1 && ++multiplied == groups) multiplied = 0;
    }
    if (i && i <= steps) store_step(i - 1, sums[(i - 1) % RING]);
    const int done = i - ADDED_BEHIND;
    if (done < 0) continue;
    totals[0].add(w[done / SCALES], done % SCALES, 0, sums[done % RING][0], p.x[added]);
    totals[1].add(w[done / SCALES], done % SCALES, 1, sums[done % RING][1], p.x[added]);
    if (done % SCALES < SCALES - 1 || ++added < groups) continue;
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
template <class W, int ROWS, int... MORE>
void multiply_fitting(const TileProduct<W>& p, const Stream& stream, int from, int to) {
  if constexpr (sizeof...(MORE) > 0)
    if (p.rows > ROWS) return multiply_fitting<W, MORE...>(p, stream, from, to);
  multiply_tile_rows<W, ROWS>(p, stream, from, to);
}

// With more rows than a tile has, blocks of this many bytes are multiplied by all of them before the next ones are read.
constexpr ptrdiff_t CACHED_BYTES = 256 << 10;

// `rows` rows times blocks [from, to); configure_byte_tiles has configured the thread's tiles for min(rows, 16) rows.
// x: [tiles of rows][groups].
template <class W>
void linear_grouped_tiles(const TileInputs* x, int groups, int rows, ptrdiff_t block_bytes, W w, int outputs,
                          const Stream& stream, float* y, const float* bias, bool add, int from, int to) {
  const int at_once = rows <= TILE_ROWS ? to - from : int(1 + CACHED_BYTES / block_bytes);
  for (int first = from; first < to; first += at_once) {
    const int end = to - first < at_once ? to : first + at_once;
    for (int r = 0; r < rows; r += TILE_ROWS) {
      const int count = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
      const TileProduct<W> product{x + ptrdiff_t(r / TILE_ROWS) * groups, groups, count, w, outputs,
                                   y + ptrdiff_t(r) * outputs, bias, add};
      multiply_fitting<W, 4, 5, 6, 8, 12, 16>(product, stream, first, end);
    }
  }
}

}  // namespace
#endif
