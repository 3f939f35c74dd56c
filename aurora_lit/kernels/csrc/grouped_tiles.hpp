// Grouped weights on Intel's matrix tiles (AMX), faster than grouped.hpp from GROUPED_TILES_MIN_ROWS rows on: the
// product of the inputs of a scale is one product of bytes. The sums are the same integers as in grouped.hpp, scaled and
// added in the same order, so both give the same bits. Source of the instruction: Intel 64 and IA-32 Architectures
// Software Developer's Manual, vol. 2, TDPBSSD.
#pragma once

#include <utility>

#include "bf16_tiles.hpp"
#include "grouped.hpp"

#if defined(AURORA_GROUPED_TILES)

namespace {

constexpr int GROUPED_TILES_MIN_ROWS = 7;  // fewer rows are faster in vectors; measured
constexpr int HALF = BLOCK / 2;            // outputs of one tile

// Rows are multiplied in as few tiles of equally many rows as hold them.
inline int num_row_tiles(int rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
inline int rows_of_tile(int rows) { return (rows + num_row_tiles(rows) - 1) / num_row_tiles(rows); }

// Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 the weights of the two halves of a block, whose rows hold four inputs
// each. For `rows` rows in all.
template <int BITS>
void configure_byte_tiles(int rows) {
  constexpr int INPUTS = GROUP / WeightGroup<BITS>::SCALES;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = tile == 4 || tile == 5 ? INPUTS : 64;
    config.rows[tile] = uint8_t(tile > 5 ? INPUTS / 4 : rows_of_tile(rows));
  }
  load_tile_config(config);
}

// One group of inputs of a tile of rows.
struct alignas(64) TileInputs {
  int8_t bytes[TILE_ROWS][GROUP];
  float scale[TILE_ROWS], scaled_sum[TILE_ROWS];

  void set(int row, const InputGroup& group) {
    std::memcpy(bytes[row], group.values, GROUP);
    scale[row] = group.scale, scaled_sum[row] = group.scaled_sum;
  }
};

// The weights of one scale of a block, as tiles read them: q - OFFSET, in a byte each.
struct alignas(64) TileWeights {
  u16v halves[2][LINES];

  template <class Group>
  inline __attribute__((always_inline)) void unpack(const Group& weights, int scale) {
    constexpr int COUNT = LINES / Group::SCALES;
#pragma GCC unroll 16
    for (int i = 0; i < 2 * COUNT; ++i)
      halves[i / COUNT][i % COUNT] =
          signed_bytes<Group::OFFSET>(weights.template bytes<u16v>(HALF * (i / COUNT), scale * COUNT + i % COUNT));
  }

 private:
  template <int OFFSET>
  static inline u16v signed_bytes(u16v bytes) {
    static_assert((OFFSET & (OFFSET - 1)) == 0 && OFFSET <= 128, "");
    if (OFFSET == 128) return bytes ^ 0x80808080u;
    if (OFFSET > 0) return (u16v)_mm512_sub_epi8((__m512i)bytes, _mm512_set1_epi8(char(OFFSET)));
    return bytes;
  }
};

// The weights of this many steps are unpacked ahead, and sums are added this many steps behind: a processor cannot
// forward from its store buffer to a tile load, nor from a tile store.
constexpr int UNPACKED_AHEAD = 3, ADDED_BEHIND = 3, RING = 4;

// Products of step number `step` for both halves of a block. Two sets of registers take turns, so that a product need
// not wait for the one before. GCC does not know that a tile load reads memory.
inline __attribute__((always_inline)) void multiply_step(int step, const TileWeights& weights, const int8_t* inputs) {
  __asm__ volatile("" ::: "memory");
  if (step & 1) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(5, inputs, GROUP);
    _tile_loadd(6, weights.halves[0], 64);
    _tile_dpbssd(2, 5, 6);
    _tile_loadd(7, weights.halves[1], 64);
    _tile_dpbssd(3, 5, 7);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, inputs, GROUP);
    _tile_loadd(6, weights.halves[0], 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, weights.halves[1], 64);
    _tile_dpbssd(1, 4, 7);
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
  f16v low[sizeof...(R)], high[sizeof...(R)];  // of the halves of a block

  inline __attribute__((always_inline)) void clear() { ((low[R] = f16v{}, high[R] = f16v{}), ...); }
  // As add_group.
  template <class Group>
  inline __attribute__((always_inline)) void add(const Group& weights, int scale, const i16v (*sums)[TILE_ROWS],
                                                 const TileInputs& inputs) {
    const f16v scales[2] = {from_fp16(weights.scales[scale]), from_fp16(weights.scales[scale] + HALF)};
    const auto add_sums = [&](f16v& total, int half, size_t r) {
      total = fused(__builtin_convertvector(sums[half][r], f16v), scales[half] * inputs.scale[r], total);
    };
    if constexpr (Group::HAS_MIN) {
      const f16v mins[2] = {from_fp16(weights.mins), from_fp16(weights.mins + HALF)};
      const auto add_mins = [&](f16v& total, int half, size_t r) {
        total = fused(mins[half], inputs.scaled_sum[r], total);
      };
      ((add_sums(low[R], 0, R), add_sums(high[R], 1, R), add_mins(low[R], 0, R), add_mins(high[R], 1, R)), ...);
    } else {
      ((add_sums(low[R], 0, R), add_sums(high[R], 1, R)), ...);
    }
  }
  inline __attribute__((always_inline)) void store(float (*to)[BLOCK]) const {
    ((std::memcpy(to[R], &low[R], sizeof low[R]), std::memcpy(to[R] + HALF, &high[R], sizeof high[R])), ...);
  }
};

// The groups of a weight; at(block, group) of W is one of them.
template <int BITS>
struct PackedGroups {
  const WeightGroup<BITS>* weight;
  int groups;  // of a block

  const WeightGroup<BITS>& at(int block, int group) const { return weight[ptrdiff_t(block) * groups + group]; }
};

template <class W>
struct TileProduct {
  const TileInputs* x;  // [tiles of rows][groups]
  int groups, rows;
  W w;
  int outputs;
  float* y;
  const float* bias;
  bool add;

  // Sums of a block and a tile of rows, to the outputs.
  __attribute__((noinline)) void put(const float (*sums)[BLOCK], int block, int tile) const {
    const int tile_rows = rows_of_tile(rows), first = block * BLOCK, left = outputs - first;
    for (int r = tile * tile_rows; r < rows && r < (tile + 1) * tile_rows; ++r)
      store_row(sums[r - tile * tile_rows], y + ptrdiff_t(r) * outputs + first, left < BLOCK ? left : BLOCK,
                bias ? bias + first : nullptr, add);
  }
};

// A step: the inputs of one scale, for a tile of rows and a block. Blocks are the outer loop, steps the inner one.
struct TileStep {
  int block, tile = 0, step = 0;

  // The next one; true if it begins another tile or block.
  bool advance(int steps, int tiles) {
    if (++step < steps) return false;
    step = 0;
    if (++tile == tiles) tile = 0, ++block;
    return true;
  }
};

// In each step the tiles multiply, while the vector units unpack a later step's weights and add the sums of an earlier
// one to the totals, which stay in registers. The weights of a block are unpacked for its first tile of rows and kept
// for the others. A tile has at most ROWS rows.
template <class W, int ROWS>
__attribute__((noinline)) void multiply_tiles(const TileProduct<W>& p, const Stream& stream, int from, int to) {
  typedef std::decay_t<decltype(p.w.at(0, 0))> Group;
  constexpr int SCALES = Group::SCALES;
  static thread_local Buffer<TileWeights> kept;
  alignas(64) i16v sums[RING][2][TILE_ROWS];
  alignas(64) float outputs[ROWS][BLOCK];
  const int groups = p.groups, steps = groups * SCALES, tiles = num_row_tiles(p.rows);
  const int slots = tiles > 1 ? steps + RING : RING, all = (to - from) * tiles * steps;
  TileWeights* unpacked = kept.at_least(size_t(slots));
  const auto after = [slots](int slot) { return slot + 1 < slots ? slot + 1 : 0; };
  TileStep unpacking{from}, multiplying{from}, adding{from};
  int to_unpack = 0, block_begins = 0, to_multiply = 0;  // slots
  const auto unpack = [&] {
    if (unpacking.tile == 0) {
      const auto& weights = p.w.at(unpacking.block, unpacking.step / SCALES);
      if (unpacking.step % SCALES == 0) weights.ask(stream);
      unpacked[to_unpack].unpack(weights, unpacking.step % SCALES);
      to_unpack = after(to_unpack);
    }
    unpacking.advance(steps, tiles);
  };
  Totals<std::make_index_sequence<ROWS>> totals;
  totals.clear();
  for (int i = 0; i < UNPACKED_AHEAD && i < all; ++i) unpack();
  for (int i = 0; i < all + ADDED_BEHIND; ++i) {
    if (i + UNPACKED_AHEAD < all) unpack();
    if (i < all) {
      const TileInputs& inputs = p.x[multiplying.tile * groups + multiplying.step / SCALES];
      multiply_step(i, unpacked[to_multiply], inputs.bytes[0] + multiplying.step % SCALES * (GROUP / SCALES));
      to_multiply = after(to_multiply);
      if (multiplying.advance(steps, tiles)) {
        if (multiplying.tile == 0) block_begins = to_multiply;
        to_multiply = block_begins;
      }
    }
    if (i && i <= all) store_step(i - 1, sums[(i - 1) % RING]);
    if (i < ADDED_BEHIND) continue;
    const TileStep at = adding;
    totals.add(p.w.at(at.block, at.step / SCALES), at.step % SCALES, sums[(i - ADDED_BEHIND) % RING],
               p.x[at.tile * groups + at.step / SCALES]);
    if (!adding.advance(steps, tiles)) continue;
    totals.store(outputs);
    p.put(outputs, at.block, at.tile);
    totals.clear();
  }
}

// Calls `use` with the first of these numbers, which ascend, that is not less than `rows`.
template <int FIRST, int... MORE, class Use>
inline void with_fitting(int rows, Use use) {
  if constexpr (sizeof...(MORE) > 0)
    if (rows > FIRST) return with_fitting<MORE...>(rows, use);
  use(std::integral_constant<int, FIRST>{});
}

// `rows` rows times blocks [from, to); configure_byte_tiles has configured the thread's tiles for them. x: [tiles of
// rows][groups].
template <class W>
void linear_grouped_tiles(const TileInputs* x, int groups, int rows, W w, int outputs, const Stream& stream, float* y,
                          const float* bias, bool add, int from, int to) {
  const TileProduct<W> product{x, groups, rows, w, outputs, y, bias, add};
  // A function for every number of rows would take long to compile.
  with_fitting<8, 9, 10, 12, 14, 16>(rows_of_tile(rows), [&](auto most) {
    multiply_tiles<W, decltype(most)::value>(product, stream, from, to);
  });
}

}  // namespace
#endif
