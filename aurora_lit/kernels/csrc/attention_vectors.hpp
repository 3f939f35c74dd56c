// Attention as vector code, for keys and values that are not stored in pairs: those in fp32, and all where there are no
// matrix tiles. Every output is summed in one fixed order, whatever the batch.
#pragma once

#include "attention_shape.hpp"

namespace {

inline void store(float* to, float x) { *to = x; }
inline void store(uint16_t* to, float x) { *to = to_bf16(x); }
inline float load(const float* from) { return *from; }
inline float load(const uint16_t* from) { return from_bf16(*from); }
inline f16v load16(const float* from) { return *reinterpret_cast<const f16v*>(from); }
inline f16v load16(const uint16_t* from) { return (f16v)(widen16(from) << 16); }

// One query of one head. The last `steps` of its positions are the columns `path` of a tree, counted from the start.
struct Query {
  const float* q;
  int64_t length;  // positions that the query attends to
  float* out;
  float* scores;
  int64_t extent;  // positions to score: all up to the last column of the path
  int steps;
  int path[MAX_PATH];
};

// Softmax numerators in place over `length` scores, zeros up to `padded`; returns the sum.
inline float exponentiate(float* scores, int64_t length, int64_t padded) {
  for (int64_t p = length; p < padded; ++p) scores[p] = -3.0e38f;
  fnv tops = fnv{} - 3.0e38f;
  for (int64_t p = 0; p < padded; p += LANES) {
    const fnv x = load_lanes(scores + p);
    tops = x > tops ? x : tops;
  }
  const float top = largest(tops);
  for (int64_t p = 0; p < padded; p += LANES) {
    const fnv e = exp_lanes(load_lanes(scores + p) - top);
    std::memcpy(scores + p, &e, sizeof e);
  }
  for (int64_t p = length; p < padded; ++p) scores[p] = 0.0f;
  fnv sums = {};
  for (int64_t p = 0; p < padded; p += LANES) sums += load_lanes(scores + p);
  return total(sums);
}

// Scores of ROWS queries over the first `positions` positions of their head (whole blocks). Values are read next.
template <class Cache, int ROWS>
void score_rows(const Query* rows, const Cache* keys, const Cache* values, int64_t positions, int D, float scale) {
  constexpr int WIDTH = 4;  // vectors of positions whose sums are in registers
  for (int64_t p = 0; p < positions; p += LANES * WIDTH) {
    const int64_t block = p / KEY_BLOCK * KEY_BLOCK, in_block = p % KEY_BLOCK;
    const Cache* at = keys + block * D + in_block;
    const Cache* next = block + KEY_BLOCK < positions ? at + D * KEY_BLOCK : values + in_block;
    fnv acc[ROWS][WIDTH] = {};
    for (int d = 0; d < D; ++d) {
      prefetch(next + d * KEY_BLOCK, LANES * WIDTH * sizeof(Cache));
      for (int v = 0; v < WIDTH; ++v) {
        const fnv key = load_lanes(at + d * KEY_BLOCK + LANES * v);
        for (int r = 0; r < ROWS; ++r) acc[r][v] = fused(rows[r].q[d], key, acc[r][v]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < WIDTH; ++v) {
        acc[r][v] *= scale;
        std::memcpy(rows[r].scores + p + LANES * v, &acc[r][v], sizeof(fnv));
      }
  }
}

// Sum of values weighted by the scores, WIDTH vectors of a head at a time; all rows have the first `shared` positions.
template <class Cache, int ROWS, int WIDTH>
void weigh_rows(const Query* rows, const float* inverse, const Cache* values, int64_t shared, int D) {
  constexpr int AHEAD = 32;  // positions
  for (int d = 0; d < D; d += LANES * WIDTH) {
    fnv acc[ROWS][WIDTH] = {};
    for (int64_t p = 0; p < shared; ++p) {
      prefetch(values + (p + AHEAD < shared ? p + AHEAD : p) * D + d, LANES * WIDTH * sizeof(Cache));
      for (int v = 0; v < WIDTH; ++v) {
        const fnv value = load_lanes(values + p * D + d + LANES * v);
        for (int r = 0; r < ROWS; ++r) acc[r][v] = fused(rows[r].scores[p], value, acc[r][v]);
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      const int64_t before_tree = rows[r].length - rows[r].steps;
      for (int64_t p = shared; p < rows[r].length; ++p) {
        const int64_t at = p < before_tree ? p : before_tree + rows[r].path[p - before_tree];
        for (int v = 0; v < WIDTH; ++v)
          acc[r][v] = fused(rows[r].scores[p], load_lanes(values + at * D + d + LANES * v), acc[r][v]);
      }
      for (int v = 0; v < WIDTH; ++v) {
        acc[r][v] *= inverse[r];
        std::memcpy(rows[r].out + d + LANES * v, &acc[r][v], sizeof(fnv));
      }
    }
  }
}

// ROWS queries over the same keys and values, which are loaded and converted once. Every row has its own sums, added in
// the order of positions, so neither ROWS nor WIDTH changes any bit.
template <class Cache, int ROWS>
void attend_rows(const Query* rows, const Cache* keys, const Cache* values, int D, float scale) {
  int64_t longest = 0, shared = rows[0].length;
  for (int r = 0; r < ROWS; ++r) {
    const int64_t before_tree = rows[r].length - rows[r].steps;
    longest = rows[r].extent > longest ? rows[r].extent : longest;
    shared = before_tree < shared ? before_tree : shared;
  }
  score_rows<Cache, ROWS>(rows, keys, values, whole_blocks(longest), D, scale);
  float inverse[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    float* tree_scores = rows[r].scores + rows[r].length - rows[r].steps;
    // In place: i <= path[i], and both ascend.
    for (int i = 0; i < rows[r].steps; ++i) tree_scores[i] = tree_scores[rows[r].path[i]];
    inverse[r] = 1.0f / exponentiate(rows[r].scores, rows[r].length, whole_blocks(rows[r].length));
  }
  if (D % (4 * LANES) == 0)
    weigh_rows<Cache, ROWS, 4>(rows, inverse, values, shared, D);
  else
    weigh_rows<Cache, ROWS, 32 / LANES>(rows, inverse, values, shared, D);
}

#if defined(__AVX512F__)
constexpr int MAX_QUERIES = 6;  // queries that share one read of keys and values; their sums fill the registers
#else
constexpr int MAX_QUERIES = 3;
#endif

// `count` queries, at most ROWS.
template <class Cache, int ROWS = MAX_QUERIES>
void attend_queries(const Query* rows, int count, const Cache* keys, const Cache* values, int D, float scale) {
  if constexpr (ROWS > 1)
    if (count < ROWS) return attend_queries<Cache, ROWS - 1>(rows, count, keys, values, D, scale);
  attend_rows<Cache, ROWS>(rows, keys, values, D, scale);
}

// Causal attention over the cache, called by all threads of a parallel region; they synchronise at the end. Queries
// that share keys are computed together: those of the heads of a group, for neighbouring tokens.
template <class Cache>
void attend_vectors(const AttentionShape& s, const float* q, const Cache* keys, const Cache* values,
                    const int64_t* slots, const int64_t* starts, const Tree& tree, float* out) {
  const int D = int(s.head_dim);
  const int64_t before = tree.before(s);
  const int64_t group = s.heads / s.kv_heads, most_parts = (group * s.queries + MAX_QUERIES - 1) / MAX_QUERIES;
  static thread_local Buffer<float> scores;
#pragma omp for schedule(dynamic, 1)
  for (int64_t job = 0; job < s.rows * s.kv_heads * most_parts; ++job) {
    const int64_t part = job % most_parts, g = job / most_parts % s.kv_heads, b = job / most_parts / s.kv_heads;
    const int64_t queries = group * s.queries_of(b), parts = (queries + MAX_QUERIES - 1) / MAX_QUERIES;
    if (part >= parts) continue;
    const Cache* kc = keys + slots[b] * s.cache_row_k + g * s.cache_head_k;
    const Cache* vc = values + slots[b] * s.cache_row_v + g * s.cache_head_v;
    const int64_t first = part * queries / parts, count = (part + 1) * queries / parts - first;
    const int64_t* parents = tree.parents_of(s, b);
    const int64_t room = whole_blocks(starts[b] + before + s.queries);
    float* of_rows = scores.at_least(size_t(room * MAX_QUERIES));
    Query rows[MAX_QUERIES];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = (first + r) / group, h = g * group + (first + r) % group;
      rows[r].q = q + row_at(s, b, s.q_row, s.q_token) + h * s.q_head + t * s.q_token;
      rows[r].out = out + ((s.first_of(b) + t) * s.heads + h) * D;
      rows[r].scores = of_rows + room * r;
      rows[r].extent = starts[b] + before + t + 1;
      rows[r].steps = parents ? path_to(parents, before + t, rows[r].path) : 0;
      rows[r].length = parents ? starts[b] + rows[r].steps : rows[r].extent;
    }
    attend_queries(rows, int(count), kc, vc, D, s.scale);
  }
}

}  // namespace
