// Product<Format> is the common interface of all weight formats: rounding inputs, and multiplying some blocks inside a
// parallel region. Formats use tiles if the processor has them.
#pragma once

#include <omp.h>

#include "int8_tiles.hpp"
#include "grouped_tiles.hpp"
#include "linear.hpp"
#include "bf16_tiles.hpp"
#include "prompt_tiles.hpp"

namespace {

// padded        number of inputs (or groups of inputs) of a stored row
// buffer_rows   number of rows that the buffer of rounded inputs needs
// block_bytes   size of a block of the weight
// round_row     rounds the inputs of row r of `rows` into the buffer x
// round_inputs  the same for `count` inputs from GROUP * g on, at most GROUP; k: padded(); if ROUNDS_GROUPS
// enter, leave  called by each thread of a parallel region before and after its products
// blocks        multiplies `rows` rows by blocks [from, to)
template <class Format>
struct Product;

template <>
struct Product<Fp32> {
  static int padded(int inputs) { return inputs; }
  static size_t buffer_rows(int rows) { return size_t(rows); }
  static ptrdiff_t block_bytes(int k) { return ptrdiff_t(k) * BLOCK * 4; }
  static constexpr bool ROUNDS_GROUPS = true;
  static void round_inputs(const float* from, int count, int g, int k, float* x, int r, int) {
    std::memcpy(x + ptrdiff_t(r) * k + g * GROUP, from, size_t(count) * 4);
  }
  static void round_row(const float* from, int inputs, float* x, int r, int) {
    std::memcpy(x + ptrdiff_t(r) * inputs, from, size_t(inputs) * 4);
  }
  static void enter(int) {}
  static void leave() {}
  static void blocks(const float* x, int k, int rows, const void* w, int outputs, const Stream& stream, float* y,
                     const float* bias, bool add, int from, int to) {
    linear_blocks<Fp32>(x, k, rows, static_cast<const float*>(w), k, outputs, stream, y, bias, add, from, to);
  }
};

template <>
struct Product<Bf16> {
  static int padded(int inputs) { return (inputs + 31) / 32 * 32; }
  static size_t buffer_rows(int rows) { return size_t((rows + 15) / 16 * 16); }
  static ptrdiff_t block_bytes(int k) { return ptrdiff_t(k) * BLOCK * 2; }
  // For tiles, each tile of inputs is contiguous, so that the next one is prefetched.
  static ptrdiff_t place(int k, int r, int i) {
#if defined(AURORA_TILES)
    if (tiles_allowed()) return tile_place(k, r, i);
#endif
    return ptrdiff_t(r) * k + i;
  }
  static constexpr bool ROUNDS_GROUPS = true;
  static void round(const float* from, int64_t count, uint16_t* to) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 16 <= count; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
    for (; i < count; ++i) to[i] = to_bf16(from[i]);
  }
  static void round_inputs(const float* from, int count, int g, int k, uint16_t* x, int r, int) {
    uint16_t* to = x + place(k, r, g * GROUP);
    round(from, count, to);
    for (int i = count; i < GROUP; ++i) to[i] = 0;
  }
  static void round_row(const float* from, int inputs, uint16_t* x, int r, int rows) {
    for (int i = 0; i < inputs; i += GROUP)
      round_inputs(from + i, inputs - i < GROUP ? inputs - i : GROUP, i / GROUP, padded(inputs), x, r, rows);
  }
  static void enter(int rows) {
#if defined(AURORA_TILES)
    if (tiles_allowed()) configure_tiles(rows < TILE_ROWS ? rows : TILE_ROWS);
#endif
    (void)rows;
  }
  static void leave() {
#if defined(AURORA_TILES)
    if (tiles_allowed()) _tile_release();
#endif
  }
  static void blocks(const uint16_t* x, int k, int rows, const void* w, int outputs, const Stream& stream,
                     float* y, const float* bias, bool add, int from, int to) {
    const uint16_t* weight = static_cast<const uint16_t*>(w);
#if defined(AURORA_TILES)
    if (tiles_allowed()) return linear_tiles(x, k, rows, weight, outputs, stream, y, bias, add, from, to);
#endif
    linear_blocks<Bf16>(x, k, rows, weight, k, outputs, stream, y, bias, add, from, to);
  }
};

// Inputs of grouped weights of any number of bits: InputGroup[rows][groups], or TileInputs[tiles of rows][groups].
struct GroupedInputs {
  static constexpr bool ROUNDS_GROUPS = true;
  static int padded(int inputs) { return num_groups(inputs); }
  static size_t buffer_rows(int rows) { return size_t((rows + 15) / 16 * 16); }
  static void round_inputs(const float* from, int count, int g, int groups, InputGroup* x, int r, int rows) {
    float whole[GROUP] = {};
    if (count < GROUP) std::memcpy(whole, from, size_t(count) * sizeof(float)), from = whole;
    if (on_tiles(rows)) {
#if defined(AURORA_GROUPED_TILES)
      InputGroup group;
      round_group(from, &group);
      tiles_of(x)[ptrdiff_t(r / rows_of_tile(rows)) * groups + g].set(r % rows_of_tile(rows), group);
#endif
      return;
    }
    round_group(from, &x[ptrdiff_t(r) * groups + g]);
  }
  static void round_row(const float* from, int inputs, InputGroup* x, int r, int rows) {
    const int groups = padded(inputs);
    for (int g = 0; g < groups; ++g)
      round_inputs(from + g * GROUP, inputs - g * GROUP < GROUP ? inputs - g * GROUP : GROUP, g, groups, x, r, rows);
  }
  // A row's values after rounding.
  static void rounded_row(const float* from, int inputs, float* to) {
    for (int k = 0; k < inputs; k += GROUP) {
      float whole[GROUP] = {};
      const int count = inputs - k < GROUP ? inputs - k : GROUP;
      std::memcpy(whole, from + k, size_t(count) * sizeof(float));
      InputGroup group;
      round_group(whole, &group);
      for (int i = 0; i < GROUP; ++i)
        if (const int input = LANE_ORDER.input[i]; input < count) to[k + input] = float(group.values[i]) * group.scale;
    }
  }
  static bool on_tiles(int rows) {
#if defined(AURORA_GROUPED_TILES)
    return rows >= GROUPED_TILES_MIN_ROWS && tiles_allowed();
#else
    (void)rows;
    return false;
#endif
  }
  static void leave() { Product<Bf16>::leave(); }

 protected:
#if defined(AURORA_GROUPED_TILES)
  static_assert(sizeof(TileInputs) <= TILE_ROWS * sizeof(InputGroup), "the buffer holds either");
  static TileInputs* tiles_of(const InputGroup* x) {
    return reinterpret_cast<TileInputs*>(const_cast<InputGroup*>(x));
  }
#endif
};

template <int BITS>
struct Product<Grouped<BITS>> : GroupedInputs {
  typedef Grouped<BITS> Format;
  static ptrdiff_t block_bytes(int groups) { return groups * ptrdiff_t(sizeof(typename Format::Weight)); }
  static void enter(int rows) {
#if defined(AURORA_GROUPED_TILES)
    if (on_tiles(rows)) configure_byte_tiles<BITS>(rows);
#endif
    (void)rows;
  }
  static void blocks(const InputGroup* x, int groups, int rows, const void* w, int outputs, const Stream& stream,
                     float* y, const float* bias, bool add, int from, int to) {
    const typename Format::Weight* weight = static_cast<const typename Format::Weight*>(w);
#if defined(AURORA_GROUPED_TILES)
    if (on_tiles(rows))
      return linear_grouped_tiles(tiles_of(x), groups, rows, PackedGroups<BITS>{weight, groups}, outputs, stream, y, bias,
                                  add, from, to);
#endif
    linear_blocks<Format>(x, groups, rows, weight, groups, outputs, stream, y, bias, add, from, to);
  }
};

#if defined(AURORA_INT8_TILES)
template <>
struct Product<Int8PerOutput> {
  static int padded(int inputs) { return (inputs + INT8_GROUP - 1) / INT8_GROUP; }
  static size_t buffer_rows(int rows) { return Product<Bf16>::buffer_rows(rows); }
  static ptrdiff_t block_bytes(int groups) { return int8_block_bytes(groups); }
  static constexpr bool ROUNDS_GROUPS = false;
  static void round_row(const float* from, int inputs, Int8Inputs* x, int r, int) {
    round_to_int16(from, inputs, x + ptrdiff_t(r) * padded(inputs));
  }
  static void enter(int rows) { Product<Bf16>::enter(rows); }
  static void leave() { Product<Bf16>::leave(); }
  static void blocks(const Int8Inputs* x, int groups, int rows, const void* w, int outputs, const Stream& stream,
                     float* y, const float* bias, bool add, int from, int to) {
    linear_int8_tiles(x, groups, rows, static_cast<const int8_t*>(w), outputs, stream, y, bias, add, from, to);
  }
};
#endif

// Products for rows of prompts, in formats that have an arithmetic of their own for them (prompt_tiles.hpp). Inputs are
// rounded by Product<Bf16>.
//   available   false: rows of prompts are computed as decoding rows
//   enter       called by each thread before these products, and after others
//   block       y [rows, width] = `rows` rows times block b of a weight, plus bias; `add`: plus y
template <class Format>
struct PromptProduct {
  static bool available() { return false; }
  static void enter() {}
  static void block(const uint16_t*, int, int, const void*, int, float*, ptrdiff_t, int, const float*, bool) {}
};

#if defined(AURORA_TILES)
template <>
struct PromptProduct<Bf16> {
  static bool available() { return tiles_allowed(); }
  static void enter() { configure_tiles(TILE_ROWS); }
  static void block(const uint16_t* x, int k, int rows, const void* w, int b, float* y, ptrdiff_t stride, int width,
                    const float* bias, bool add) {
    const uint16_t* weights = static_cast<const uint16_t*>(w) + ptrdiff_t(b) * BLOCK * k;
    multiply_rows(x, k, rows, weights, y, stride, width, bias, add);
  }
};

template <int BITS>
struct PromptProduct<Grouped<BITS>> : PromptProduct<Bf16> {
  static void block(const uint16_t* x, int k, int rows, const void* w, int b, float* y, ptrdiff_t stride, int width,
                    const float* bias, bool add) {
    static thread_local Buffer<uint16_t> unpacked;
    uint16_t* weights = unpacked.at_least(size_t(k) * BLOCK);
    const int groups = k / GROUP;
    unpack_to_bf16<BITS>(static_cast<const WeightGroup<BITS>*>(w) + ptrdiff_t(b) * groups, groups, weights);
    multiply_rows(x, k, rows, weights, y, stride, width, bias, add);
  }
};
#endif

// Grouped weights of any number of bits, which each matrix says. Its inputs are those of all of them.
struct AnyGrouped {
  typedef InputGroup Input;
};
template <>
struct Product<AnyGrouped> : GroupedInputs {};
template <>
struct PromptProduct<AnyGrouped> : PromptProduct<Grouped<8>> {};

struct Matrix {
  const void* weight;  // packed
  const float* bias;   // or null
  int64_t outputs, inputs;
  int64_t bits;  // of a grouped weight; 0: it has another format
};

// Calls `use` with the format of a matrix, which is Format unless that is AnyGrouped.
template <class Format, class Use>
inline __attribute__((always_inline)) auto with_format(const Matrix& m, Use use) {
  if constexpr (std::is_same<Format, AnyGrouped>::value) {
    if (m.bits == 4) return use(Grouped<4>{});
    if (m.bits == 5) return use(Grouped<5>{});
    if (m.bits == 6) return use(Grouped<6>{});
    return use(Grouped<8>{});
  } else {
    return use(Format{});
  }
}

// y [rows, outputs] = x [rows, inputs] times a packed weight, plus bias, on all threads.
template <class Format>
void multiply(const float* x, ptrdiff_t x_stride, int rows, const void* w, int inputs, int outputs, float* y,
              const float* bias) {
  typedef Product<Format> P;
  const int k = P::padded(inputs), blocks = num_blocks(outputs);
  static thread_local Buffer<typename Format::Input> rounded;
  typename Format::Input* to = rounded.at_least(P::buffer_rows(rows) * k);
  for (int r = 0; r < rows; ++r) P::round_row(x + r * x_stride, inputs, to, r, rows);
  const char* end = static_cast<const char*>(w) + blocks * P::block_bytes(k);
#pragma omp parallel
  {
    P::enter(rows);
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    P::blocks(to, k, rows, w, outputs, Stream{end, end}, y, bias, false, blocks * thread / threads,
              blocks * (thread + 1) / threads);
    P::leave();
  }
}

}  // namespace
