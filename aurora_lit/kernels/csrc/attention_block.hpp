// One tile of queries over one block of KEY_BLOCK positions, on Intel's matrix tiles (AMX): scores, exponentials,
// weighted values, and adding up the blocks. A tile has up to 8 queries. Queries and probabilities are the sum of two
// bf16 values, which are two rows of a matrix tile; so they keep 16 bits.
//
// Shapes: D head size.
#pragma once

#include "attention_shape.hpp"
#include "bf16_tiles.hpp"

#if defined(AURORA_TILES)

namespace {

constexpr float LOWEST = -3.0e38f;                       // score of a masked position
constexpr int TILE_QUERIES = TILE_ROWS / 2;              // a tile's rows are the high and low parts of each query
constexpr int TILE = TILE_ROWS * TILE_INPUTS;
constexpr int BLOCK_STEPS = KEY_BLOCK / TILE_INPUTS;     // tiles of probabilities of a block

// The softmax of a tile's queries over some positions. Values are not yet divided by the sum of exponentials.
struct Softmax {
  float* tops;    // [8] largest score
  float* sums;    // [8] sum of exponentials
  float* values;  // [8, D] values weighted by the exponentials; of one block: [8, 2, D], whose pairs are to be added

  static size_t size(int D) { return size_t(TILE_QUERIES) * size_t(2 * D + 2); }
  explicit Softmax(float* at) : tops(at), sums(at + TILE_QUERIES), values(at + 2 * TILE_QUERIES) {}
};

// One thread's memory.
struct TileBuffers {
  Buffer<uint16_t> q;             // [D / 32, 8 queries, high and low part, 32 dims]
  Buffer<uint16_t> p;             // [BLOCK_STEPS, 8 queries, high and low part, 32 positions]
  Buffer<uint16_t> keys, values;  // a block whose positions are in the order of a tree's path
  Buffer<float> scores;           // of two blocks: [2, 8 queries, high and low part, KEY_BLOCK]
  Buffer<float> part, sum;        // softmax of each of two blocks, and of all blocks so far
  int configured = 0;             // queries that the tiles are configured for

  // Tiles 0-3 hold sums, 4 the parts of up to 8 queries or of their probabilities, 6 and 7 keys or values.
  void configure(int queries) {
    if (queries == configured) return;
    configured = queries;
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = uint8_t(tile < 6 ? 2 * queries : TILE_ROWS);
    }
    load_tile_config(config);
  }
};

// 2^x for x <= 0, relative error below 2e-7.
inline __m512 exp2_vector(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // keeps NaN
  const __m512 shifter = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const __m512 n = _mm512_add_ps(x, shifter), r = _mm512_sub_ps(x, _mm512_sub_ps(n, shifter));
  __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.326472721e-3f), _mm512_set1_ps(9.671512812e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550733745e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402224208e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931469776e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return (__m512)_mm512_add_epi32((__m512i)p, _mm512_slli_epi32((__m512i)n, 23));
}

// 32 values as high + low, both bf16.
inline void store_parts(__m512 a, __m512 b, uint16_t* high, uint16_t* low) {
  alignas(64) static constexpr uint16_t UPPER[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(UPPER), mask = _mm512_set1_epi32(int(0xffff0000u));
  _mm512_storeu_si512(high, _mm512_permutex2var_epi16((__m512i)a, upper, (__m512i)b));
  const __m512 rest_a = _mm512_sub_ps(a, (__m512)_mm512_and_si512((__m512i)a, mask));
  const __m512 rest_b = _mm512_sub_ps(b, (__m512)_mm512_and_si512((__m512i)b, mask));
  _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh(rest_b, rest_a));
}

// Reduce the lanes of each of 8 vectors: lane r of the result is that of rows[r]. All rows have the same order.
template <class Operation>
inline __m256 reduce_rows(const __m512* rows, Operation operation) {
  __m512 x[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 a = rows[i], b = rows[i + 4];
    x[i] = operation(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 2; ++i)
    x[i] = operation(_mm512_shuffle_f32x4(x[i], x[i + 2], 0x88), _mm512_shuffle_f32x4(x[i], x[i + 2], 0xdd));
  x[0] = operation(_mm512_shuffle_ps(x[0], x[1], 0x44), _mm512_shuffle_ps(x[0], x[1], 0xee));
  x[0] = operation(x[0], _mm512_permute_ps(x[0], 0xb1));
  const __m512i order = _mm512_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castps512_ps256(_mm512_permutexvar_ps(order, x[0]));
}

// Begin to compute the sum over `steps` of a [rows, 32] times b [32, 16 n] in the sum tiles; n is 1 to 4. A step's tile
// of a is TILE values after that of the step before, those of b `b_step`. A row of b's pairs has `b_row` values.
inline void multiply_tiles(const uint16_t* a, int steps, const uint16_t* b, int64_t b_row, int64_t b_step, int n) {
  const int64_t b_bytes = b_row * 2;
  asm volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < steps; ++step, a += TILE, b += b_step) {
    _tile_loadd(4, a, TILE_INPUTS * 2);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (n > 1) {
      _tile_loadd(7, b + 32, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (n > 2) {
      _tile_loadd(6, b + 64, b_bytes);
      _tile_dpbf16ps(2, 4, 6);
    }
    if (n > 3) {
      _tile_loadd(7, b + 96, b_bytes);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
}

// Store the sum tiles [rows, 16 n].
inline void store_tiles(int n, float* out, int64_t out_row) {
  const int64_t out_bytes = out_row * 4;
  _tile_stored(0, out, out_bytes);
  if (n > 1) _tile_stored(1, out + 16, out_bytes);
  if (n > 2) _tile_stored(2, out + 32, out_bytes);
  if (n > 3) _tile_stored(3, out + 48, out_bytes);
}

// Softmax numerators of `rows` queries over the first 16 N positions of a block; row r has the first valid[r] of them,
// or all if not MASKED. Writes the largest score and the sum of each row; `ask(r)` prefetches.
template <int N, bool MASKED, class Ask>
inline void exponentiate_rows(float* scores, int rows, const int64_t* valid, Ask ask, uint16_t* p, float* tops,
                              float* sums) {
  const __m512 lowest = _mm512_set1_ps(LOWEST);
  __m512 of_rows[TILE_QUERIES];
  const auto mask = [&](int r, int v) {
    const int64_t count = valid[r] - 16 * v;
    return __mmask16(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
  };
  for (int r = 0; r < rows; ++r) {
    of_rows[r] = lowest;
    for (int v = 0; v < N; ++v) {
      float* high = scores + 2 * r * KEY_BLOCK + 16 * v;
      __m512 x = _mm512_add_ps(_mm512_load_ps(high), _mm512_load_ps(high + KEY_BLOCK));
      if (MASKED) x = _mm512_mask_mov_ps(lowest, mask(r, v), x);
      _mm512_store_ps(high, x);
      of_rows[r] = _mm512_max_ps(of_rows[r], x);
    }
  }
  for (int r = rows; r < TILE_QUERIES; ++r) of_rows[r] = lowest;
  const __mmask8 used = __mmask8((1 << rows) - 1);
  _mm256_mask_storeu_ps(tops, used, reduce_rows(of_rows, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); }));
  for (int r = 0; r < rows; ++r) {
    const __m512 top = _mm512_set1_ps(tops[r]);
    ask(r);
    __m512 e[N];
    for (int v = 0; v < N; ++v) {
      e[v] = exp2_vector(_mm512_sub_ps(_mm512_load_ps(scores + 2 * r * KEY_BLOCK + 16 * v), top));
      if (MASKED) e[v] = _mm512_maskz_mov_ps(mask(r, v), e[v]);
      of_rows[r] = v ? _mm512_add_ps(of_rows[r], e[v]) : e[v];
    }
    for (int v = 0; v < N; v += 2) {
      uint16_t* high = p + v / 2 * TILE + 2 * r * TILE_INPUTS;
      store_parts(e[v], e[v + 1], high, high + TILE_INPUTS);
    }
  }
  _mm256_mask_storeu_ps(sums, used, reduce_rows(of_rows, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); }));
}

// Rows [first, first + rows) of a tile over one block of their key-value head, in three steps: scores, exponentials,
// values. Row r attends to the first valid[r] positions of the block.
struct BlockRows {
  int first, rows, D;
  const int64_t* valid;
  int64_t longest = 0, shortest = KEY_BLOCK;

  BlockRows(int first, int rows, int D, const int64_t* valid) : first(first), rows(rows), D(D), valid(valid) {
    for (int r = first; r < first + rows; ++r) {
      longest = valid[r] > longest ? valid[r] : longest;
      shortest = valid[r] < shortest ? valid[r] : shortest;
    }
  }
  bool is_half() const { return longest <= KEY_BLOCK / 2; }
  int num_tiles() const { return longest > 16 ? int(longest + 15) / 16 : 1; }  // of scores

  void multiply_keys(const TileBuffers& room, const uint16_t* keys) const {
    multiply_tiles(room.q.data() + 2 * first * TILE_INPUTS, D / TILE_INPUTS, keys, 2 * KEY_BLOCK,
                   TILE_INPUTS * KEY_BLOCK, num_tiles());
  }
  void store_scores(float* scores) const { store_tiles(num_tiles(), scores + 2 * first * KEY_BLOCK, KEY_BLOCK); }
  // values: the block's, to be prefetched; or null.
  void exponentiate(TileBuffers& room, float* scores, const uint16_t* values, const Softmax& to) const {
    scores += 2 * first * KEY_BLOCK;
    uint16_t* p = room.p.data() + 2 * first * TILE_INPUTS;
    float *tops = to.tops + first, *sums = to.sums + first;
    const int lines = KEY_BLOCK * D / 32;
    const auto ask = [&](int r) {
      if (!values) return;
      for (int line = lines * r / rows; line < lines * (r + 1) / rows; ++line) __builtin_prefetch(values + line * 32);
    };
    if (is_half())
      exponentiate_rows<2, true>(scores, rows, valid + first, ask, p, tops, sums);
    else if (shortest < KEY_BLOCK)
      exponentiate_rows<4, true>(scores, rows, valid + first, ask, p, tops, sums);
    else
      exponentiate_rows<4, false>(scores, rows, valid + first, ask, p, tops, sums);
  }
  // Dims [d, d + 64), or up to D.
  void multiply_values(const TileBuffers& room, const uint16_t* values, int d) const {
    multiply_tiles(room.p.data() + 2 * first * TILE_INPUTS, is_half() ? 1 : BLOCK_STEPS, values + 2 * d, 2 * D,
                   TILE_INPUTS * D, D - d < 64 ? (D - d) / 16 : 4);
  }
  void store_values(const Softmax& to, int d) const {
    store_tiles(D - d < 64 ? (D - d) / 16 : 4, to.values + 2 * first * D + d, D);
  }
};

// Add the softmax over the next block to that over all blocks before.
inline void add_block(const Softmax& next, int rows, int D, const Softmax& sum) {
  const __m256 old_top = _mm256_loadu_ps(sum.tops), next_top = _mm256_loadu_ps(next.tops);
  const __m256 top = _mm256_max_ps(old_top, next_top);
  alignas(64) float factors[2 * TILE_QUERIES];
  const __m512 changes = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_sub_ps(old_top, top)),
                                            _mm256_sub_ps(next_top, top), 1);
  const __m512 both = exp2_vector(changes);
  const __m256 kept = _mm512_castps512_ps256(both), taken = _mm512_extractf32x8_ps(both, 1);
  _mm512_store_ps(factors, both);
  const float *keep = factors, *take = factors + TILE_QUERIES;
  _mm256_storeu_ps(sum.tops, top);
  _mm256_storeu_ps(sum.sums,
                   _mm256_fmadd_ps(_mm256_loadu_ps(next.sums), taken, _mm256_mul_ps(_mm256_loadu_ps(sum.sums), kept)));
  for (int r = 0; r < rows; ++r)
    for (int d = 0; d < D; d += 16) {
      const float* high = next.values + 2 * r * D + d;
      const __m512 value = _mm512_add_ps(_mm512_loadu_ps(high), _mm512_loadu_ps(high + D));
      float* to = sum.values + r * D + d;
      const __m512 old = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(keep[r]));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(take[r]), old));
    }
}

}  // namespace
#endif
