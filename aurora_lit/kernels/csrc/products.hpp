// Product<Format> is the common interface of all weight formats: rounding inputs, and multiplying some blocks inside a
// parallel region. Formats use tiles if the processor has them.
#pragma once

#include "int8_tiles.hpp"
#include "grouped_tiles.hpp"
#include "linear.hpp"
#include "bf16_tiles.hpp"

namespace {

// padded        number of inputs (or groups of inputs) of a stored row
// buffer_rows   number of rows that the buffer of rounded inputs needs
// block_bytes   size of a block of the weight
// round_row     rounds the inputs of row r into the buffer x
// rounded_row   the values of row r after rounding, as fp32
// enter, leave  called by each thread of a parallel region before and after its products
// blocks        multiplies `rows` rows by blocks [from, to)
template <class Format>
struct Product;

template <>
struct Product<Fp32> {
  static int padded(int inputs) { return inputs; }
  static size_t buffer_rows(int rows) { return size_t(rows); }
  static ptrdiff_t block_bytes(int k) { return ptrdiff_t(k) * BLOCK * 4; }
  static void round_row(const float* from, int inputs, float* x, int r) {
    std::memcpy(x + ptrdiff_t(r) * inputs, from, size_t(inputs) * 4);
  }
  static void rounded_row(const float* x, int inputs, int r, float* to) {
    std::memcpy(to, x + ptrdiff_t(r) * inputs, size_t(inputs) * 4);
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
  static void round_row(const float* from, int inputs, uint16_t* x, int r) {
    const int k_padded = padded(inputs);
    for (int k = 0; k < k_padded; k += 32) {
      uint16_t* to = x + place(k_padded, r, k);
      int i = 0;
#if defined(__AVX512BF16__)
      for (; i < 32 && k + i + 16 <= inputs; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + k + i)));
#endif
      for (; i < 32 && k + i < inputs; ++i) to[i] = to_bf16(from[k + i]);
      for (; i < 32; ++i) to[i] = 0;
    }
  }
  static void rounded_row(const uint16_t* x, int inputs, int r, float* to) {
    for (int k = 0; k < inputs; k += 32) {
      const uint16_t* from = x + place(padded(inputs), r, k);
      for (int i = 0; i < 32 && k + i < inputs; ++i) to[k + i] = from_bf16(from[i]);
    }
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

template <int BITS>
struct Product<Grouped<BITS>> {
  typedef Grouped<BITS> Format;
  static int padded(int inputs) { return num_groups(inputs); }
  static size_t buffer_rows(int rows) { return size_t(rows > 16 ? (rows + 15) / 16 * 16 : rows); }
  static ptrdiff_t block_bytes(int groups) { return groups * ptrdiff_t(sizeof(typename Format::Weight)); }
  static void round_row(const float* from, int inputs, InputGroup* x, int r) {
    InputGroup* to = x + ptrdiff_t(r) * padded(inputs);
    int k = 0;
    for (; k + GROUP <= inputs; k += GROUP) round_group<BITS>(from + k, to++);
    if (k == inputs) return;
    float rest[GROUP] = {};
    std::memcpy(rest, from + k, size_t(inputs - k) * sizeof(float));
    round_group<BITS>(rest, to);
  }
  static void rounded_row(const InputGroup* x, int inputs, int r, float* to) {
    const InputGroup* group = x + ptrdiff_t(r) * padded(inputs);
    for (int k = 0; k < inputs; k += GROUP, ++group)
      for (int i = 0; i < GROUP && k + i < inputs; ++i) to[k + i] = float(group->values[i]) * group->scale;
  }
  static bool on_tiles(int rows) {
#if defined(AURORA_GROUPED_TILES)
    return rows >= GROUPED_TILES_MIN_ROWS && tiles_allowed();
#else
    (void)rows;
    return false;
#endif
  }
  static void enter(int rows) {
#if defined(AURORA_GROUPED_TILES)
    if (on_tiles(rows)) configure_grouped_tiles<BITS>(rows < TILE_ROWS ? rows : TILE_ROWS);
#endif
    (void)rows;
  }
  static void leave() { Product<Bf16>::leave(); }
  static void blocks(const InputGroup* x, int groups, int rows, const void* w, int outputs, const Stream& stream,
                     float* y, const float* bias, bool add, int from, int to) {
    const typename Format::Weight* weight = static_cast<const typename Format::Weight*>(w);
#if defined(AURORA_GROUPED_TILES)
    if (on_tiles(rows))
      return linear_grouped_tiles<BITS>(x, groups, rows, weight, outputs, stream, y, bias, add, from, to);
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
  static void round_row(const float* from, int inputs, Int8Inputs* x, int r) {
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

// y [rows, outputs] = x [rows, inputs] times a packed weight, plus bias, on all threads.
template <class Format>
void multiply(const float* x, ptrdiff_t x_stride, int rows, const void* w, int inputs, int outputs, float* y,
              const float* bias) {
  typedef Product<Format> P;
  const int k = P::padded(inputs), blocks = num_blocks(outputs);
  static thread_local Buffer<typename Format::Input> rounded;
  typename Format::Input* to = rounded.at_least(P::buffer_rows(rows) * k);
  for (int r = 0; r < rows; ++r) P::round_row(x + r * x_stride, inputs, to, r);
  const char* end = static_cast<const char*>(w) + blocks * P::block_bytes(k);
#pragma omp parallel
  {
    P::enter(rows);
#pragma omp for schedule(static)
    for (int b = 0; b < blocks; ++b) P::blocks(to, k, rows, w, outputs, Stream{end, end}, y, bias, false, b, b + 1);
    P::leave();
  }
}

}  // namespace
