// The bf16 format on Intel's matrix tiles (AMX): 16 rows take as long as one, so verifying the proposals of many
// sequences adds little time. A tile's rows are independent, and each output is summed over the inputs in one order, so
// this is as batch-invariant as the vector code. Its order differs from the vector code's, so a process uses only one.
// Source of the instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2, TDPBF16PS.
#pragma once

#include "linear.hpp"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define AURORA_TILES 1

namespace {

constexpr int TILE_ROWS = 16;    // rows of one tile of inputs
constexpr int TILE_INPUTS = 32;  // inputs that one tile instruction takes

// True if the system permits this process to use tiles; requested once.
inline bool tiles_allowed() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return allowed;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The intrinsics of older GCCs say that 8 bytes are read, and so may lose the others (GCC bug 114098).
inline void load_tile_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }
inline void store_tile_config(TileConfig& config) { __asm__ volatile("sttilecfg %0" : "=m"(config)); }

// Offset of input i of row r: inputs are stored tile by tile for each 16 rows.
inline ptrdiff_t tile_place(int k_padded, int r, int i) {
  constexpr int TILE = TILE_ROWS * TILE_INPUTS;
  return (ptrdiff_t(r / TILE_ROWS) * (k_padded / TILE_INPUTS) + i / TILE_INPUTS) * TILE + r % TILE_ROWS * TILE_INPUTS +
         i % TILE_INPUTS;
}

// Tiles 0-3 hold sums of two tiles of rows times the two halves of a block, 4 and 5 inputs, 6 and 7 weights.
inline void configure_tiles(int rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = uint8_t(tile < 6 ? rows : TILE_ROWS);
  }
  load_tile_config(config);
}

// `rows` rows times blocks [from, to); the thread's tiles are configured for min(rows, 16) rows. x: bf16 inputs at the
// offsets of tile_place; the unused rows of the last tile may have any contents.
inline void linear_tiles(const uint16_t* x, int k_padded, int rows, const uint16_t* w, int outputs,
                         const Stream& stream, float* y, const float* bias, bool add, int from, int to) {
  const int x_bytes = TILE_INPUTS * 2, w_bytes = BLOCK * 2 * 2, sum_bytes = BLOCK * 4;
  alignas(64) float sums[2 * TILE_ROWS * BLOCK];
  for (int b = from; b < to; ++b) {
    const int first = b * BLOCK, width = outputs - first < BLOCK ? outputs - first : BLOCK;
    const uint16_t* wb = w + ptrdiff_t(b) * BLOCK * k_padded;
    const float* bb = bias ? bias + first : nullptr;
    for (int r = 0; r < rows; r += 2 * TILE_ROWS) {
      const uint16_t* x0 = x + ptrdiff_t(r) * k_padded;
      const uint16_t* x1 = x0 + TILE_ROWS * k_padded;
      const bool both = rows - r > TILE_ROWS;
      _tile_zero(0);
      _tile_zero(1);
      if (both) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int k = 0; k < k_padded; k += TILE_INPUTS) {
        if (r == 0) stream.ask<TILE_INPUTS * BLOCK * 2>(wb + ptrdiff_t(k) * BLOCK);
        _tile_loadd(6, wb + ptrdiff_t(k) * BLOCK, w_bytes);
        _tile_loadd(7, wb + ptrdiff_t(k) * BLOCK + BLOCK, w_bytes);
        _tile_loadd(4, x0 + k * TILE_ROWS, x_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
          _tile_loadd(5, x1 + k * TILE_ROWS, x_bytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      // Whole tiles are stored directly to the output, the rest through `sums`.
      const int n = rows - r < 2 * TILE_ROWS ? rows - r : 2 * TILE_ROWS;
      const bool plain = width == BLOCK && !add && !bias;
      const int direct = !plain ? 0 : rows <= TILE_ROWS ? n : n / TILE_ROWS * TILE_ROWS;
      float* y0 = y + ptrdiff_t(r) * outputs + first;
      const int y_bytes = outputs * 4;
      if (direct) {
        _tile_stored(0, y0, y_bytes);
        _tile_stored(1, y0 + 16, y_bytes);
      } else {
        _tile_stored(0, sums, sum_bytes);
        _tile_stored(1, sums + 16, sum_bytes);
      }
      if (direct == 2 * TILE_ROWS) {
        _tile_stored(2, y0 + ptrdiff_t(TILE_ROWS) * outputs, y_bytes);
        _tile_stored(3, y0 + ptrdiff_t(TILE_ROWS) * outputs + 16, y_bytes);
      } else if (both) {
        _tile_stored(2, sums + TILE_ROWS * BLOCK, sum_bytes);
        _tile_stored(3, sums + TILE_ROWS * BLOCK + 16, sum_bytes);
      }
      for (int i = direct; i < n; ++i) store_row(sums + i * BLOCK, y0 + ptrdiff_t(i) * outputs, width, bb, add);
    }
  }
}

}  // namespace
#endif
