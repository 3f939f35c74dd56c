// Attention of prompts on Intel's matrix tiles (AMX), over keys and values in bf16 that are stored in pairs
// (attention_shape.hpp). A prompt has many queries, which read a block of keys and values together. Queries and
// probabilities are the sum of two bf16 values, as those of decoding rows (attention_tiles.hpp), but both parts are added
// up in the tiles.
//
// Every query adds up blocks of KEY_BLOCK positions in their order, with its own largest score so far (FlashAttention,
// Dao et al. 2022, arXiv 2205.14135). A masked position adds exactly zero, so no bit depends on the queries of the same
// tile, on a prompt's chunks or on threads.
#pragma once

#include "attention_block.hpp"

#if defined(AURORA_TILES)

namespace {

constexpr int PROMPT_QUERIES = 2 * TILE_ROWS;  // of a tile: two matrix tiles
constexpr int ROW_GROUP = TILE_QUERIES;        // queries whose exponentials are computed together, by reduce_rows

// One thread's memory for one tile of queries.
struct PromptBuffers {
  Buffer<uint16_t> q;          // [D / 32, high and low part, 2, 16 queries, 32 dims]
  Buffer<uint16_t> p;          // [BLOCK_STEPS, high and low part, 2, 16 queries, 32 positions]
  Buffer<float> scores;        // of two blocks: [2, 32 queries, KEY_BLOCK]
  Buffer<float> values;        // [32 queries, D]
  float tops[PROMPT_QUERIES];  // largest score so far
  float sums[PROMPT_QUERIES];  // of exponentials

  void prepare(int D) {
    q.at_least(size_t(D / TILE_INPUTS) * 4 * TILE);
    p.at_least(size_t(BLOCK_STEPS) * 4 * TILE);
    scores.at_least(size_t(2) * PROMPT_QUERIES * KEY_BLOCK);
    values.at_least(size_t(PROMPT_QUERIES) * D);
    std::memset(values.data(), 0, sizeof(float) * size_t(PROMPT_QUERIES) * D);
    std::memset(sums, 0, sizeof sums);
    for (float& top : tops) top = LOWEST;
  }
};

// Scores of all queries for positions [16 n, 16 n + 16) of a block.
inline void multiply_prompt_keys(const uint16_t* q, const uint16_t* keys, int n, int D, float* scores) {
  asm volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
  _tile_zero(0);
  _tile_zero(1);
  for (int step = 0; step < D / TILE_INPUTS; ++step) {
    _tile_loadd(6, keys + step * TILE_INPUTS * KEY_BLOCK + n * 32, KEY_BLOCK * 4);
    for (int part = 0; part < 2; ++part, q += 2 * TILE) {
      _tile_loadd(4, q, TILE_INPUTS * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, q + TILE, TILE_INPUTS * 2);
      _tile_dpbf16ps(1, 5, 6);
    }
  }
  _tile_stored(0, scores + 16 * n, KEY_BLOCK * 4);
  _tile_stored(1, scores + TILE_ROWS * KEY_BLOCK + 16 * n, KEY_BLOCK * 4);
}

// Add a block's values, weighted by the probabilities, to all queries' sums.
inline void add_prompt_values(const uint16_t* p, const uint16_t* values, int D, float* sums) {
  asm volatile("" ::: "memory");
  for (int d = 0; d < D; d += 32) {
    float *at0 = sums + d, *at1 = sums + TILE_ROWS * D + d;
    _tile_loadd(0, at0, D * 4);
    _tile_loadd(1, at0 + 16, D * 4);
    _tile_loadd(2, at1, D * 4);
    _tile_loadd(3, at1 + 16, D * 4);
    for (int step = 0; step < BLOCK_STEPS; ++step) {
      const uint16_t* v = values + step * TILE_INPUTS * D + 2 * d;
      _tile_loadd(6, v, D * 4);
      _tile_loadd(7, v + 32, D * 4);
      for (int part = 0; part < 2; ++part) {
        const uint16_t* of_part = p + (step * 4 + part * 2) * TILE;
        _tile_loadd(4, of_part, TILE_INPUTS * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, of_part + TILE, TILE_INPUTS * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, at0, D * 4);
    _tile_stored(1, at0 + 16, D * 4);
    _tile_stored(2, at1, D * 4);
    _tile_stored(3, at1 + 16, D * 4);
  }
}

// Exponentials of queries [first, first + ROW_GROUP) for a block; rescales their sums if a larger score is found.
// Query r attends to the first valid[r - first] positions of the block, or to all if not MASKED.
template <bool MASKED>
inline void exponentiate_prompt(PromptBuffers& room, const float* scores, int first, const int64_t* valid, int D) {
  constexpr int N = KEY_BLOCK / 16;
  const __m512 lowest = _mm512_set1_ps(LOWEST);
  const auto mask = [&](int i, int v) {
    const int64_t count = valid[i] - 16 * v;
    return __mmask16(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
  };
  const auto score = [&](int i, int v) {
    const __m512 x = _mm512_load_ps(scores + (first + i) * KEY_BLOCK + 16 * v);
    return MASKED ? _mm512_mask_mov_ps(lowest, mask(i, v), x) : x;
  };
  __m512 of_rows[ROW_GROUP];
  for (int i = 0; i < ROW_GROUP; ++i) {
    of_rows[i] = score(i, 0);
    for (int v = 1; v < N; ++v) of_rows[i] = _mm512_max_ps(of_rows[i], score(i, v));
  }
  const __m256 old_tops = _mm256_loadu_ps(room.tops + first);
  const __m256 block_tops = reduce_rows(of_rows, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
  const __m256 tops = _mm256_max_ps(old_tops, block_tops);
  const __m256 factors = _mm512_castps512_ps256(exp2_vector(_mm512_castps256_ps512(_mm256_sub_ps(old_tops, tops))));
  _mm256_storeu_ps(room.tops + first, tops);
  for (int i = 0; i < ROW_GROUP; ++i) {
    const __m512 top = _mm512_set1_ps(room.tops[first + i]);
    __m512 e[N];
    for (int v = 0; v < N; ++v) {
      e[v] = exp2_vector(_mm512_sub_ps(score(i, v), top));
      if (MASKED) e[v] = _mm512_maskz_mov_ps(mask(i, v), e[v]);
      of_rows[i] = v ? _mm512_add_ps(of_rows[i], e[v]) : e[v];
    }
    const int row = first + i;
    uint16_t* to = room.p.data() + row / TILE_ROWS * TILE + row % TILE_ROWS * TILE_INPUTS;
    for (int v = 0; v < N; v += 2) store_parts(e[v], e[v + 1], to + 2 * v * TILE, to + (2 * v + 2) * TILE);
  }
  const __m256 block_sums = reduce_rows(of_rows, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
  _mm256_storeu_ps(room.sums + first, _mm256_fmadd_ps(_mm256_loadu_ps(room.sums + first), factors, block_sums));
  __mmask8 changed = _mm256_cmp_ps_mask(factors, _mm256_set1_ps(1.0f), _CMP_NEQ_UQ);
  for (; changed; changed &= __mmask8(changed - 1)) {
    const int i = __builtin_ctz(changed);
    const __m512 factor = _mm512_set1_ps(factors[i]);
    float* of_row = room.values.data() + (first + i) * D;
    for (int d = 0; d < D; d += 16) _mm512_store_ps(of_row + d, _mm512_mul_ps(_mm512_load_ps(of_row + d), factor));
  }
}

// Queries [first, first + rows) of sequence b for key-value head g, ordered by token.
inline void attend_prompt_tile(const AttentionShape& s, int64_t b, int64_t g, int64_t first, int rows, const float* q,
                               const uint16_t* keys, const uint16_t* values, int64_t start, PromptBuffers& room,
                               float* out) {
  const int D = int(s.head_dim);
  const int64_t group = s.heads / s.kv_heads, block_size = int64_t(KEY_BLOCK) * D;
  const auto token = [&](int r) { return (first + r) / group; };
  const auto head = [&](int r) { return g * group + (first + r) % group; };
  room.prepare(D);
  const __m512 scale = _mm512_set1_ps(s.scale * 1.44269504088896341f);  // scores are exponents of 2
  for (int r = 0; r < PROMPT_QUERIES; ++r) {
    const int row = r < rows ? r : rows - 1;  // the last tile is filled up
    const float* x = q + row_at(s, b, s.q_row, s.q_token) + head(row) * s.q_head + token(row) * s.q_token;
    for (int d = 0; d < D; d += TILE_INPUTS) {
      uint16_t* high = room.q.data() + (d / TILE_INPUTS * 4 + r / TILE_ROWS) * TILE + r % TILE_ROWS * TILE_INPUTS;
      store_parts(_mm512_mul_ps(_mm512_loadu_ps(x + d), scale), _mm512_mul_ps(_mm512_loadu_ps(x + d + 16), scale),
                  high, high + 2 * TILE);
    }
  }
  const int64_t length = start + token(rows - 1) + 1, blocks = whole_blocks(length) / KEY_BLOCK;
  const auto scores_of = [&](int64_t c) { return room.scores.data() + c % 2 * PROMPT_QUERIES * KEY_BLOCK; };
  for (int n = 0; n < KEY_BLOCK / 16; ++n) multiply_prompt_keys(room.q.data(), keys, n, D, scores_of(0));
  for (int64_t c = 0; c < blocks; ++c) {
    for (int part = 0; part < PROMPT_QUERIES / ROW_GROUP; ++part) {
      // The tiles compute a quarter of the next block's scores beside a quarter of this one's exponentials.
      if (c + 1 < blocks) multiply_prompt_keys(room.q.data(), keys + (c + 1) * block_size, part, D, scores_of(c + 1));
      const int from = part * ROW_GROUP;
      int64_t valid[ROW_GROUP];
      bool masked = false;
      for (int i = 0; i < ROW_GROUP; ++i) {
        valid[i] = start + token(from + i < rows ? from + i : rows - 1) + 1 - c * KEY_BLOCK;
        masked |= valid[i] < KEY_BLOCK;
      }
      if (masked)
        exponentiate_prompt<true>(room, scores_of(c), from, valid, D);
      else
        exponentiate_prompt<false>(room, scores_of(c), from, valid, D);
    }
    add_prompt_values(room.p.data(), values + c * block_size, D, room.values.data());
  }
  for (int r = 0; r < rows; ++r) {
    const __m512 inverse = _mm512_set1_ps(1.0f / room.sums[r]);
    float* y = out + ((s.first_of(b) + token(r)) * s.heads + head(r)) * D;
    for (int d = 0; d < D; d += 16)
      _mm512_storeu_ps(y + d, _mm512_mul_ps(_mm512_load_ps(room.values.data() + r * D + d), inverse));
  }
}

// This thread's share of the prompts' attention. Threads take tiles one by one, the longest first.
inline void attend_prompts(const AttentionShape& s, const float* q, const uint16_t* keys, const uint16_t* values,
                           const int64_t* slots, const int64_t* starts, float* out) {
  static_assert(KEY_BLOCK / 16 == PROMPT_QUERIES / ROW_GROUP, "a quarter of a block's scores for each group of rows");
  static thread_local PromptBuffers room;
  TileConfig products, own;  // the first is that of the products around attention
  store_tile_config(products);
  for (int tile = 0; tile < 8; ++tile) own.row_bytes[tile] = 64, own.rows[tile] = TILE_ROWS;
  load_tile_config(own);
  for (int64_t b = s.decoding(); b < s.rows; ++b) {
    const int64_t queries = s.heads / s.kv_heads * s.queries_of(b);
    const int64_t tiles = (queries + PROMPT_QUERIES - 1) / PROMPT_QUERIES;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t job = 0; job < tiles * s.kv_heads; ++job) {
      const int64_t g = job % s.kv_heads, first = (tiles - 1 - job / s.kv_heads) * PROMPT_QUERIES;
      const int rows = int(queries - first < PROMPT_QUERIES ? queries - first : PROMPT_QUERIES);
      attend_prompt_tile(s, b, g, first, rows, q, keys + slots[b] * s.cache_row_k + g * s.cache_head_k,
                         values + slots[b] * s.cache_row_v + g * s.cache_head_v, starts[b], room, out);
    }
  }
  load_tile_config(products);
}

}  // namespace
#endif
