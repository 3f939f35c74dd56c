// What the kinds of weights have in common for those who multiply: rounding inputs, and a share of a product inside a
// parallel region. bf16 goes through tiles where the processor has them.
#pragma once

#include "byte_tiles.hpp"
#include "group_tiles.hpp"
#include "linear.hpp"
#include "tiles.hpp"

namespace {

// round_row makes row r of the inputs `x` as a kind takes them, seen says which numbers they have become.
template <class Kind>
struct Product;

template <>
struct Product<Float> {
  static int padded(int inputs) { return inputs; }
  static size_t buffer_rows(int rows) { return size_t(rows); }
  static ptrdiff_t block_bytes(int k) { return ptrdiff_t(k) * BLOCK * 4; }
  static void round_row(const float* from, int inputs, float* x, int r) {
    std::memcpy(x + ptrdiff_t(r) * inputs, from, size_t(inputs) * 4);
  }
  static void seen(const float* x, int inputs, int r, float* to) {
    std::memcpy(to, x + ptrdiff_t(r) * inputs, size_t(inputs) * 4);
  }
  static void enter(int) {}
  static void leave() {}
  static void blocks(const float* x, int k, int rows, const void* w, int outputs, const Stream& stream, float* y,
                     const float* bias, bool add, int from, int to) {
    linear_blocks<Float>(x, k, rows, static_cast<const float*>(w), k, outputs, stream, y, bias, add, from, to);
  }
};

template <>
struct Product<BFloat> {
  static int padded(int inputs) { return (inputs + 31) / 32 * 32; }
  static size_t buffer_rows(int rows) { return size_t((rows + 15) / 16 * 16); }
  static ptrdiff_t block_bytes(int k) { return ptrdiff_t(k) * BLOCK * 2; }
  // For tiles each tile of inputs lies as one piece, so that the next is fetched ahead.
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
  static void seen(const uint16_t* x, int inputs, int r, float* to) {
    for (int k = 0; k < inputs; k += 32) {
      const uint16_t* from = x + place(padded(inputs), r, k);
      for (int i = 0; i < 32 && k + i < inputs; ++i) to[k + i] = from_bf16(from[i]);
    }
  }
  // Each thread of the region calls these two around its products.
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
    linear_blocks<BFloat>(x, k, rows, weight, k, outputs, stream, y, bias, add, from, to);
  }
};

template <int BITS>
struct Product<Grouped<BITS>> {
  typedef Grouped<BITS> Kind;
  static int padded(int inputs) { return num_groups(inputs); }
  static size_t buffer_rows(int rows) { return size_t(rows > 16 ? (rows + 15) / 16 * 16 : rows); }
  static ptrdiff_t block_bytes(int groups) { return groups * ptrdiff_t(sizeof(typename Kind::Weight)); }
  static void round_row(const float* from, int inputs, InputGroup* x, int r) {
    InputGroup* to = x + ptrdiff_t(r) * padded(inputs);
    int k = 0;
    for (; k + GROUP <= inputs; k += GROUP) round_group<BITS>(from + k, to++);
    if (k == inputs) return;
    float rest[GROUP] = {};
    std::memcpy(rest, from + k, size_t(inputs - k) * sizeof(float));
    round_group<BITS>(rest, to);
  }
  static void seen(const InputGroup* x, int inputs, int r, float* to) {
    const InputGroup* group = x + ptrdiff_t(r) * padded(inputs);
    for (int k = 0; k < inputs; k += GROUP, ++group)
      for (int i = 0; i < GROUP && k + i < inputs; ++i) to[k + i] = float(group->values[i]) * group->scale;
  }
  static bool on_tiles(int rows) {
#if defined(AURORA_GROUP_TILES)
    return rows >= GROUP_TILE_MIN_ROWS && tiles_allowed();
#else
    (void)rows;
    return false;
#endif
  }
  static void enter(int rows) {
#if defined(AURORA_GROUP_TILES)
    if (on_tiles(rows)) configure_group_tiles<BITS>(rows < TILE_ROWS ? rows : TILE_ROWS);
#endif
    (void)rows;
  }
  static void leave() { Product<BFloat>::leave(); }
  static void blocks(const InputGroup* x, int groups, int rows, const void* w, int outputs, const Stream& stream,
                     float* y, const float* bias, bool add, int from, int to) {
    const typename Kind::Weight* weight = static_cast<const typename Kind::Weight*>(w);
#if defined(AURORA_GROUP_TILES)
    if (on_tiles(rows))
      return linear_group_tiles<BITS>(x, groups, rows, weight, outputs, stream, y, bias, add, from, to);
#endif
    linear_blocks<Kind>(x, groups, rows, weight, groups, outputs, stream, y, bias, add, from, to);
  }
};

#if defined(AURORA_BYTE_TILES)
template <>
struct Product<Bytes> {
  static int padded(int inputs) { return (inputs + BYTE_GROUP - 1) / BYTE_GROUP; }
  static size_t buffer_rows(int rows) { return Product<BFloat>::buffer_rows(rows); }
  static ptrdiff_t block_bytes(int groups) { return byte_block(groups); }
  static void round_row(const float* from, int inputs, ByteInputs* x, int r) {
    round_to_bytes(from, inputs, x + ptrdiff_t(r) * padded(inputs));
  }
  static void enter(int rows) { Product<BFloat>::enter(rows); }
  static void leave() { Product<BFloat>::leave(); }
  static void blocks(const ByteInputs* x, int groups, int rows, const void* w, int outputs, const Stream& stream,
                     float* y, const float* bias, bool add, int from, int to) {
    linear_byte_tiles(x, groups, rows, static_cast<const int8_t*>(w), outputs, stream, y, bias, add, from, to);
  }
};
#endif

// y [rows, outputs] = x [rows, inputs] times a packed weight, on all threads.
template <class Kind>
void multiply(const float* x, ptrdiff_t x_stride, int rows, const void* w, int inputs, int outputs, float* y,
              const float* bias) {
  typedef Product<Kind> P;
  const int k = P::padded(inputs), blocks = num_blocks(outputs);
  static thread_local Buffer<typename Kind::Input> rounded;
  typename Kind::Input* to = rounded.at_least(P::buffer_rows(rows) * k);
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
