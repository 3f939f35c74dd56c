// Attention as vector code, for keys and values that are not stored in pairs: those in fp32, and all where there are no
// matrix tiles. Every output is summed in one fixed order, whatever the batch.
#pragma once

#include "attention_shape.hpp"

namespace {

inline void store(float* to, float x) { *to = x; }
inline void store(uint16_t* to, float x) { *to = to_bf16(x); }
inline float load(const float* from) { return *from; }
inline float load(const uint16_t* from) { return from_bf16(*from); }

// Two vectors of neighbouring values, as fp32. Those of bf16 are not in their order: the first vector has those at even
// places and the second those at odd ones, which takes half as many instructions as widening.
template <class Cache>
struct Pair;
template <>
struct Pair<float> {
  fnv first, second;
  explicit Pair(const float* from) : first(load_lanes(from)), second(load_lanes(from + LANES)) {}
};
template <>
struct Pair<uint16_t> {
  fnv first, second;
  explicit Pair(const uint16_t* from) {
    unv both;
    std::memcpy(&both, from, sizeof both);
    first = (fnv)(both << 16), second = (fnv)(both & 0xffff0000u);
  }
};
template <class Cache>
inline void add_pair(float factor, const Pair<Cache>& x, fnv* sums) {
  sums[0] = fused(factor, x.first, sums[0]), sums[1] = fused(factor, x.second, sums[1]);
}
// Store the sums of a pair times `factor`, in order.
template <class Cache>
inline void store_pair(const fnv* sums, float factor, float* to) {
  fnv x[2] = {sums[0] * factor, sums[1] * factor};
  if (sizeof(Cache) == 2) interleave(x);
  std::memcpy(to, x, sizeof x);
}

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

// Queries that share one read of keys and values. Their sums fill the registers: of two vectors each, or of four for up
// to half as many queries.
#if defined(__AVX512F__)
constexpr int MAX_QUERIES = 12;
#else
constexpr int MAX_QUERIES = 6;
#endif
constexpr int FEW_QUERIES = MAX_QUERIES / 2;
template <int ROWS>
constexpr int SUMS_OF_ROW = ROWS > FEW_QUERIES ? 2 : 4;

// Scores of ROWS queries over the first `positions` positions of their head (whole blocks). Values are read next.
template <class Cache, int ROWS>
void score_rows(const Query* rows, const Cache* keys, const Cache* values, int64_t positions, int D, float scale) {
  constexpr int WIDTH = SUMS_OF_ROW<ROWS>;
  for (int64_t p = 0; p < positions; p += LANES * WIDTH) {
    const int64_t block = p / KEY_BLOCK * KEY_BLOCK, in_block = p % KEY_BLOCK;
    const Cache* at = keys + block * D + in_block;
    const Cache* next = block + KEY_BLOCK < positions ? at + D * KEY_BLOCK : values + in_block;
    fnv acc[ROWS][WIDTH] = {};
    for (int d = 0; d < D; ++d) {
      prefetch(next + d * KEY_BLOCK, LANES * WIDTH * sizeof(Cache));
      for (int v = 0; v < WIDTH; v += 2) {
        const Pair<Cache> key(at + d * KEY_BLOCK + LANES * v);
        for (int r = 0; r < ROWS; ++r) add_pair(rows[r].q[d], key, acc[r] + v);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < WIDTH; v += 2) store_pair<Cache>(acc[r] + v, scale, rows[r].scores + p + LANES * v);
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
      for (int v = 0; v < WIDTH; v += 2) {
        const Pair<Cache> value(values + p * D + d + LANES * v);
        for (int r = 0; r < ROWS; ++r) add_pair(rows[r].scores[p], value, acc[r] + v);
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      const int64_t before_tree = rows[r].length - rows[r].steps;
      for (int64_t p = shared; p < rows[r].length; ++p) {
        const int64_t at = p < before_tree ? p : before_tree + rows[r].path[p - before_tree];
        for (int v = 0; v < WIDTH; v += 2)
          add_pair(rows[r].scores[p], Pair<Cache>(values + at * D + d + LANES * v), acc[r] + v);
      }
      for (int v = 0; v < WIDTH; v += 2) store_pair<Cache>(acc[r] + v, inverse[r], rows[r].out + d + LANES * v);
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
  if (D % (SUMS_OF_ROW<ROWS> * LANES) == 0)
    weigh_rows<Cache, ROWS, SUMS_OF_ROW<ROWS>>(rows, inverse, values, shared, D);
  else
    weigh_rows<Cache, ROWS, 32 / LANES>(rows, inverse, values, shared, D);
}

// `count` queries, at most ROWS.
template <class Cache, int ROWS = FEW_QUERIES>
void attend_few(const Query* rows, int count, const Cache* keys, const Cache* values, int D, float scale) {
  if constexpr (ROWS > 1)
    if (count < ROWS) return attend_few<Cache, ROWS - 1>(rows, count, keys, values, D, scale);
  attend_rows<Cache, ROWS>(rows, keys, values, D, scale);
}

// `count` queries, at most MAX_QUERIES.
template <class Cache>
void attend_queries(const Query* rows, int count, const Cache* keys, const Cache* values, int D, float scale) {
  if (count == MAX_QUERIES) return attend_rows<Cache, MAX_QUERIES>(rows, keys, values, D, scale);
  const int rest = count > FEW_QUERIES ? count - FEW_QUERIES : 0;
  attend_few(rows, count - rest, keys, values, D, scale);
  if (rest) attend_few(rows + FEW_QUERIES, rest, keys, values, D, scale);
}

// Neighbouring queries of a row that are computed together: [first(part), first(part + 1)).
struct QueryParts {
  int64_t queries, count;
  bool is_long;  // a prompt's parts are as large as can be; of a few columns they are even, for all threads

  explicit QueryParts(int64_t queries) : queries(queries), is_long(queries >= 4 * MAX_QUERIES) {
    const int64_t most = is_long ? MAX_QUERIES : FEW_QUERIES;
    count = (queries + most - 1) / most;
  }
  int64_t first(int64_t part) const {
    if (part == count) return queries;
    return is_long ? part * MAX_QUERIES : part * queries / count;
  }
};

// Causal attention over the cache, called by all threads of a parallel region; they synchronise at the end. Queries
// that share keys are computed together: those of the heads of a group, for neighbouring tokens.
template <class Cache>
void attend_vectors(const AttentionShape& s, const float* q, const Cache* keys, const Cache* values,
                    const int64_t* slots, const int64_t* starts, const Tree& tree, float* out) {
  const int D = int(s.head_dim);
  const int64_t group = s.heads / s.kv_heads, most_parts = (group * s.queries + FEW_QUERIES - 1) / FEW_QUERIES;
  static thread_local Buffer<float> scores;
#pragma omp for schedule(dynamic, 1)
  for (int64_t job = 0; job < s.rows * s.kv_heads * most_parts; ++job) {
    const int64_t part = job % most_parts, g = job / most_parts % s.kv_heads, b = job / most_parts / s.kv_heads;
    const QueryParts parts(group * s.queries_of(b));
    if (part >= parts.count) continue;
    const Cache* kc = keys + slots[b] * s.cache_row_k + g * s.cache_head_k;
    const Cache* vc = values + slots[b] * s.cache_row_v + g * s.cache_head_v;
    const int64_t first = parts.first(part), count = parts.first(part + 1) - first;
    const int64_t* parents = tree.parents_of(s, b);
    const int64_t room = whole_blocks(starts[b] + s.queries);
    float* of_rows = scores.at_least(size_t(room * MAX_QUERIES));
    Query rows[MAX_QUERIES];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = (first + r) / group, h = g * group + (first + r) % group;
      rows[r].q = q + row_at(s, b, s.q_row, s.q_token) + h * s.q_head + t * s.q_token;
      rows[r].out = out + ((s.first_of(b) + t) * s.heads + h) * D;
      rows[r].scores = of_rows + room * r;
      rows[r].extent = starts[b] + t + 1;
      rows[r].steps = parents ? path_to(parents, t, rows[r].path) : 0;
      rows[r].length = parents ? starts[b] + rows[r].steps : rows[r].extent;
    }
    attend_queries(rows, int(count), kc, vc, D, s.scale);
  }
}

}  // namespace
