// Weights of eight bits with a scale an output, on Intel's matrix tiles (AMX): the fewest instructions a weight, for
// what need not be exact (a draft) or is looked at again (screen.hpp). Inputs have sixteen bits, a scale a row, as two signed
// bytes; products are summed as integers, exact in any order, and turned into floats once: as batch-invariant as the
// other kinds. row_scaled.py packs the weights.
// Source of the instruction: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2, TDPBSSD.
#pragma once

#include "tiles.hpp"

#include <cmath>

#if defined(__AMX_INT8__) && defined(AURORA_TILES)
#define AURORA_BYTE_TILES 1

namespace {

constexpr int BYTE_GROUP = 64;  // inputs that one tile instruction takes

struct alignas(64) ByteInputs {  // of one row
  int8_t high[BYTE_GROUP], low[BYTE_GROUP];  // value = 256 * high + low
  float scale;                               // of the whole row
};

// A block of outputs: their scales, then group after group of inputs, [half][line][output][4 inputs].
constexpr ptrdiff_t BYTE_STEP = ptrdiff_t(BLOCK) * BYTE_GROUP;
inline ptrdiff_t byte_block(int groups) { return BLOCK * ptrdiff_t(sizeof(float)) + groups * BYTE_STEP; }

struct Bytes {
  typedef int8_t Weight;
  typedef ByteInputs Input;
};

// A row's inputs to integers. The scale is NaN where an input is not finite, and so are all sums with it.
inline void round_to_bytes(const float* x, int inputs, ByteInputs* out) {
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
  const int groups = (inputs + BYTE_GROUP - 1) / BYTE_GROUP;
  for (int g = 0; g < groups; ++g) {
    out[g].scale = scale;
    for (int part = 0; part < BYTE_GROUP; part += 16) {
      const int from = g * BYTE_GROUP + part, count = inputs - from < 16 ? inputs - from : 16;
      f16v v = f16v{};
      if (count == 16) v = *reinterpret_cast<const f16v*>(x + from);
      for (int j = 0; count < 16 && j < count; ++j) v[j] = x[from + j];
      const f16v scaled = factor > 0.0f ? v * factor : f16v{};
      constexpr float TO_INTEGER = 0x1.8p23f;  // added, it leaves the nearest integer in the low bits
      const i16v q = (i16v)(scaled + TO_INTEGER) - 0x4b400000, high = (q + 128) >> 8, low = q - (high << 8);
      _mm_storeu_si128((__m128i*)(out[g].high + part), _mm512_cvtepi32_epi8((__m512i)high));
      _mm_storeu_si128((__m128i*)(out[g].low + part), _mm512_cvtepi32_epi8((__m512i)low));
    }
  }
}

// Tiles 0-3: sums of high and of low bytes for both halves of a block. 4, 5: high, low bytes. 6, 7: weights.
// As wide as bf16's: configure_tiles.
// Blocks [from, to) of the outputs; x holds whole tiles of rows where there are more than 16.
inline void linear_byte_tiles(const ByteInputs* x, int groups, int rows, const int8_t* w, int outputs,
                              const Stream& stream, float* y, const float* bias, bool add, int from, int to) {
  const ptrdiff_t stride = groups * ptrdiff_t(sizeof(ByteInputs));
  alignas(64) i16v sums[4][TILE_ROWS];
  for (int b = from; b < to; ++b) {
    const int first = b * BLOCK, width = outputs - first < BLOCK ? outputs - first : BLOCK;
    const int8_t* block = w + b * byte_block(groups);
    const float* scales = reinterpret_cast<const float*>(block);
    const int8_t* weights = block + BLOCK * sizeof(float);
    for (int r = 0; r < rows; r += TILE_ROWS) {
      const ByteInputs* of_rows = x + ptrdiff_t(r) * groups;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int g = 0; g < groups; ++g) {
        const int8_t* at = weights + g * BYTE_STEP;
        if (r == 0) stream.ask<int(BYTE_STEP)>(at);
        _tile_loadd(4, of_rows[g].high, stride);
        _tile_loadd(5, of_rows[g].low, stride);
        _tile_loadd(6, at, 64);
        _tile_loadd(7, at + BYTE_STEP / 2, 64);
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
        put_row(out, y + ptrdiff_t(r + i) * outputs + first, width, bias ? bias + first : nullptr, add);
      }
    }
  }
}

}  // namespace
#endif
