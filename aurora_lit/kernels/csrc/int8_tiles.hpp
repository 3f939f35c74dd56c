// The int8 format with one scale per output, on Intel's matrix tiles (AMX). It needs the fewest instructions per
// weight, and is used where results need not be exact (a draft). Inputs are rounded to 16 bits with a scale per row and
// split into two signed bytes. Products are summed as integers, which is exact in any order, and converted to float
// once. So this is as batch-invariant as the other formats. kernels/quantization.py packs the weights. Source of the
// instruction: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2, TDPBSSD.
#pragma once

#include "bf16_tiles.hpp"

#include <cmath>

#if defined(__AMX_INT8__) && defined(AURORA_TILES)
#define AURORA_INT8_TILES 1

namespace {

constexpr int INT8_GROUP = 64;  // inputs that one tile instruction takes

struct alignas(64) Int8Inputs {  // of one row
  int8_t high[INT8_GROUP], low[INT8_GROUP];  // value = 256 * high + low
  float scale;                               // of the whole row
};

// A block of outputs is stored as their scales, then for each group of inputs [half of the outputs][line][output][4].
constexpr ptrdiff_t INT8_STEP = ptrdiff_t(BLOCK) * INT8_GROUP;
inline ptrdiff_t int8_block_bytes(int groups) { return BLOCK * ptrdiff_t(sizeof(float)) + groups * INT8_STEP; }

struct Int8PerOutput {
  typedef int8_t Weight;
  typedef Int8Inputs Input;
};

// Round a row's inputs to integers. If an input is not finite, the scale is NaN, and so are all sums.
inline void round_to_int16(const float* x, int inputs, Int8Inputs* out) {
  constexpr float LIMIT = 127 * 256 + 127;
  f16v tops = f16v{}, poison = f16v{};
  int i = 0;
  for (; i + 16 <= inputs; i += 16) {
    const f16v v = *reinterpret_cast<const f16v*>(x + i), size = (f16v)((u16v)v & 0x7fffffffu);
    tops = size > tops ? size : tops;
    poison += v * 0.0f;
  }
  float most = largest(tops), none = total(poison);
  for (int rest = i; rest < inputs; ++rest) {
    most = std::fabs(x[rest]) > most ? std::fabs(x[rest]) : most;
    none += x[rest] * 0.0f;
  }
  const float scale = most / LIMIT + none;
  const float factor = most > 1e-30f && scale == scale ? LIMIT / most : 0.0f;
  const int groups = (inputs + INT8_GROUP - 1) / INT8_GROUP;
  for (int g = 0; g < groups; ++g) {
    out[g].scale = scale;
    for (int part = 0; part < INT8_GROUP; part += 16) {
      const int from = g * INT8_GROUP + part, count = inputs - from < 16 ? inputs - from : 16;
      f16v v = f16v{};
      if (count == 16) v = *reinterpret_cast<const f16v*>(x + from);
      for (int j = 0; count < 16 && j < count; ++j) v[j] = x[from + j];
      const i16v q = nearest(factor > 0.0f ? v * factor : f16v{}), high = (q + 128) >> 8, low = q - (high << 8);
      _mm_storeu_si128((__m128i*)(out[g].high + part), _mm512_cvtepi32_epi8((__m512i)high));
      _mm_storeu_si128((__m128i*)(out[g].low + part), _mm512_cvtepi32_epi8((__m512i)low));
    }
  }
}

// `rows` rows times blocks [from, to). With more than 16 rows, x is padded to whole tiles of rows. Tiles 0 and 1 hold
// the sums of high bytes for the two halves of a block, 2 and 3 those of low bytes, 4 and 5 high and low bytes of
// inputs, 6 and 7 weights; they have the shape that configure_tiles sets.
inline void linear_int8_tiles(const Int8Inputs* x, int groups, int rows, const int8_t* w, int outputs,
                              const Stream& stream, float* y, const float* bias, bool add, int from, int to) {
  const ptrdiff_t stride = groups * ptrdiff_t(sizeof(Int8Inputs));
  alignas(64) i16v sums[4][TILE_ROWS];
  for (int b = from; b < to; ++b) {
    const int first = b * BLOCK, width = outputs - first < BLOCK ? outputs - first : BLOCK;
    const int8_t* block = w + b * int8_block_bytes(groups);
    const float* scales = reinterpret_cast<const float*>(block);
    const int8_t* weights = block + BLOCK * sizeof(float);
    for (int r = 0; r < rows; r += TILE_ROWS) {
      const Int8Inputs* of_rows = x + ptrdiff_t(r) * groups;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int g = 0; g < groups; ++g) {
        const int8_t* at = weights + g * INT8_STEP;
        if (r == 0) stream.ask<int(INT8_STEP)>(at);
        _tile_loadd(4, of_rows[g].high, stride);
        _tile_loadd(5, of_rows[g].low, stride);
        _tile_loadd(6, at, 64);
        _tile_loadd(7, at + INT8_STEP / 2, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      const int n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
      for (int i = 0; i < n; ++i) {
        const float scale = of_rows[ptrdiff_t(i) * groups].scale;
        alignas(64) float out[BLOCK];
        for (int v = 0; v < 2; ++v) {
          const f16v high = __builtin_convertvector(sums[v][i], f16v);
          const f16v low = __builtin_convertvector(sums[2 + v][i], f16v);
          const f16v value = (high * 256.0f + low) * (*reinterpret_cast<const f16v*>(scales + 16 * v) * scale);
          std::memcpy(out + 16 * v, &value, sizeof value);
        }
        store_row(out, y + ptrdiff_t(r + i) * outputs + first, width, bias ? bias + first : nullptr, add);
      }
    }
  }
}

}  // namespace
#endif
