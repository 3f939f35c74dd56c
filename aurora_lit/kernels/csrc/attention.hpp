// Attention over the KV cache for few queries. Every output is summed in one fixed order, whatever the batch.
#pragma once

#include "vectors.hpp"

namespace {

inline void store(float* to, float x) { *to = x; }
inline void store(uint16_t* to, float x) { *to = to_bf16(x); }
inline float load(const float* from) { return *from; }
inline float load(const uint16_t* from) { return from_bf16(*from); }
inline f16v load16(const float* from) { return *reinterpret_cast<const f16v*>(from); }
inline f16v load16(const uint16_t* from) { return (f16v)(widen16(from) << 16); }

struct AttentionShape {
  int64_t rows, queries, heads, kv_heads, head_dim;  // rows: sequences; queries: the most positions of a sequence
  int64_t q_row, q_head, q_token;     // strides of the query, in elements
  int64_t k_row, k_head, k_token;     // of the new keys
  int64_t v_row, v_head, v_token;     // of the new values
  int64_t cache_row_k, cache_head_k;  // of the cached keys [slot, head, block, dim, position in the block]
  int64_t cache_row_v, cache_head_v;  // of the cached values [slot, head, position, dim]
  float scale;
  const int64_t* begins;  // [rows + 1]: index of each row's first query; or null: every row has `queries` queries
  int64_t num_prompts;    // the last `num_prompts` rows read a prompt, the others decode

  bool is_prompt(int64_t row) const { return row >= rows - num_prompts; }
  int64_t queries_of(int64_t row) const { return begins ? begins[row + 1] - begins[row] : queries; }
  int64_t first_of(int64_t row) const { return begins ? begins[row] : row * queries; }
};

constexpr int KEY_BLOCK = 64;  // positions whose keys are stored together, so that keys are read sequentially

// Offset of a position's key in the slot of its head; the key's dims are KEY_BLOCK apart.
inline int64_t key_place(int64_t position, int D) {
  return position / KEY_BLOCK * KEY_BLOCK * D + position % KEY_BLOCK;
}

// A tree of proposals. They are stored in `columns` columns after a row's start, and the pass computes the last
// `queries` of them. A column follows its parent, or the last position before the start if that is negative. It attends
// to the positions before the start and to its ancestors, in the order that they would have in the sequence.
struct Tree {
  const int64_t* parents;  // [rows, columns], each less than its column; or null: each column follows the one before
  int64_t columns;
};

constexpr int MAX_PATH = 32;

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

// The columns on the path from the start to `column`; returns how many.
inline int path_to(const int64_t* parents, int64_t column, int* path) {
  int steps = 0;
  for (int64_t at = column; at >= 0 && steps < MAX_PATH; at = parents[at]) path[steps++] = int(at);
  for (int i = 0; i < steps / 2; ++i) {
    const int swapped = path[i];
    path[i] = path[steps - 1 - i];
    path[steps - 1 - i] = swapped;
  }
  return steps;
}

inline int64_t whole_blocks(int64_t length) { return (length + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK; }

// Softmax numerators in place over `length` scores, zeros up to `padded`; returns the sum.
inline float exponentiate(float* scores, int64_t length, int64_t padded) {
  for (int64_t p = length; p < padded; ++p) scores[p] = -3.0e38f;
  f16v tops = f16v{} - 3.0e38f;
  for (int64_t p = 0; p < padded; p += 16) {
    const f16v x = load16(scores + p);
    tops = x > tops ? x : tops;
  }
  const float top = largest(tops);
  for (int64_t p = 0; p < padded; p += 16) {
    const f16v e = exp_vector(load16(scores + p) - top);
    std::memcpy(scores + p, &e, 64);
  }
  for (int64_t p = length; p < padded; ++p) scores[p] = 0.0f;
  f16v sums = f16v{};
  for (int64_t p = 0; p < padded; p += 16) sums += load16(scores + p);
  return total(sums);
}

template <int ROWS, int WIDTH>
inline void clear(f16v (*sums)[WIDTH]) {
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < WIDTH; ++v) sums[r][v] = f16v{};
}

// Scores of ROWS queries over the first `positions` positions of their head (whole blocks). Values are read next.
template <class Cache, int ROWS>
void score_rows(const Query* rows, const Cache* keys, const Cache* values, int64_t positions, int D, float scale) {
  constexpr int WIDTH = KEY_BLOCK / 16;
  for (int64_t p = 0; p < positions; p += KEY_BLOCK, keys += D * KEY_BLOCK) {
    const Cache* next = p + KEY_BLOCK < positions ? keys + D * KEY_BLOCK : values;
    f16v acc[ROWS][WIDTH];
    clear<ROWS, WIDTH>(acc);
    for (int d = 0; d < D; ++d) {
      const Cache* at = keys + d * KEY_BLOCK;
      prefetch(next + d * KEY_BLOCK, KEY_BLOCK * sizeof(Cache));
      f16v key[WIDTH];
      for (int v = 0; v < WIDTH; ++v) key[v] = load16(at + 16 * v);
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < WIDTH; ++v) acc[r][v] += rows[r].q[d] * key[v];
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < WIDTH; ++v) {
        acc[r][v] *= scale;
        std::memcpy(rows[r].scores + p + 16 * v, &acc[r][v], 64);
      }
  }
}

// Sum of values weighted by the scores, WIDTH vectors of a head at a time; all rows have the first `shared` positions.
template <class Cache, int ROWS, int WIDTH>
void weigh_rows(const Query* rows, const float* inverse, const Cache* values, int64_t shared, int D) {
  constexpr int AHEAD = 32;  // positions
  for (int d = 0; d < D; d += 16 * WIDTH) {
    f16v acc[ROWS][WIDTH];
    clear<ROWS, WIDTH>(acc);
    for (int64_t p = 0; p < shared; ++p) {
      prefetch(values + (p + AHEAD < shared ? p + AHEAD : p) * D + d, 16 * WIDTH * sizeof(Cache));
      f16v value[WIDTH];
      for (int v = 0; v < WIDTH; ++v) value[v] = load16(values + p * D + d + 16 * v);
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < WIDTH; ++v) acc[r][v] += rows[r].scores[p] * value[v];
    }
    for (int r = 0; r < ROWS; ++r) {
      const int64_t before_tree = rows[r].length - rows[r].steps;
      for (int64_t p = shared; p < rows[r].length; ++p) {
        const int64_t at = p < before_tree ? p : before_tree + rows[r].path[p - before_tree];
        for (int v = 0; v < WIDTH; ++v) acc[r][v] += rows[r].scores[p] * load16(values + at * D + d + 16 * v);
      }
      for (int v = 0; v < WIDTH; ++v) {
        acc[r][v] *= inverse[r];
        std::memcpy(rows[r].out + d + 16 * v, &acc[r][v], 64);
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
  if (D % 64 == 0)
    weigh_rows<Cache, ROWS, 4>(rows, inverse, values, shared, D);
  else
    weigh_rows<Cache, ROWS, 2>(rows, inverse, values, shared, D);
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

// Offset of row b in a tensor with these strides; rows with different numbers of queries are concatenated.
inline int64_t row_at(const AttentionShape& s, int64_t b, int64_t row, int64_t token) {
  return s.begins ? s.begins[b] * token : b * row;
}

// Write the new keys and values of tokens [from, to) of one row and key-value head after the row's start.
template <class Cache>
void write_slot(const AttentionShape& s, int64_t b, int64_t g, const float* k, const float* v, Cache* keys,
                Cache* values, const int64_t* slots, const int64_t* starts, const Tree& tree, int64_t from,
                int64_t to) {
  const int D = int(s.head_dim);
  const int64_t first = tree.parents ? tree.columns - s.queries : 0;
  for (int64_t t = from; t < to; ++t) {
    const int64_t at = starts[b] + first + t;
    const float* kt = k + row_at(s, b, s.k_row, s.k_token) + g * s.k_head + t * s.k_token;
    const float* vt = v + row_at(s, b, s.v_row, s.v_token) + g * s.v_head + t * s.v_token;
    Cache* kc = keys + slots[b] * s.cache_row_k + g * s.cache_head_k + key_place(at, D);
    Cache* vc = values + slots[b] * s.cache_row_v + g * s.cache_head_v + at * D;
    for (int d = 0; d < D; ++d) store(kc + d * KEY_BLOCK, kt[d]);
    for (int d = 0; d < D; ++d) store(vc + d, vt[d]);
  }
}

// Causal attention over the cache, called by all threads of a parallel region; they synchronise at the end. Queries
// that share keys are computed together: those of the heads of a group, for neighbouring tokens.
template <class Cache>
void attend_share(const AttentionShape& s, const float* q, const Cache* keys, const Cache* values,
                  const int64_t* slots, const int64_t* starts, const Tree& tree, float* out) {
  const int D = int(s.head_dim);
  const int64_t before = tree.parents ? tree.columns - s.queries : 0;  // columns computed by earlier passes
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
    const int64_t room = whole_blocks(starts[b] + before + s.queries);
    float* of_rows = scores.at_least(size_t(room * MAX_QUERIES));
    Query rows[MAX_QUERIES];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = (first + r) / group, h = g * group + (first + r) % group;
      rows[r].q = q + row_at(s, b, s.q_row, s.q_token) + h * s.q_head + t * s.q_token;
      rows[r].out = out + ((s.first_of(b) + t) * s.heads + h) * D;
      rows[r].scores = of_rows + room * r;
      rows[r].extent = starts[b] + before + t + 1;
      rows[r].steps = tree.parents ? path_to(tree.parents + b * tree.columns, before + t, rows[r].path) : 0;
      rows[r].length = tree.parents ? starts[b] + rows[r].steps : rows[r].extent;
    }
    attend_queries(rows, int(count), kc, vc, D, s.scale);
  }
}

// Write new keys and values, then attend, on all threads.
template <class Cache>
void attention(const AttentionShape& s, const float* q, const float* k, const float* v, Cache* keys, Cache* values,
               const int64_t* slots, const int64_t* starts, float* out) {
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t job = 0; job < s.rows * s.kv_heads; ++job)
      write_slot(s, job / s.kv_heads, job % s.kv_heads, k, v, keys, values, slots, starts, Tree{}, 0, s.queries);
    attend_share(s, q, keys, values, slots, starts, Tree{}, out);
  }
}

// Copy position from[i] of slot slots[i] to position to[i], for all heads, one copy after another.
template <class Cache>
void move_positions(const AttentionShape& s, Cache* keys, Cache* values, const int64_t* slots, const int64_t* from,
                    const int64_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t g = 0; g < s.kv_heads; ++g) {
      Cache* k = keys + slots[i] * s.cache_row_k + g * s.cache_head_k;
      Cache* v = values + slots[i] * s.cache_row_v + g * s.cache_head_v;
      const int64_t old_place = key_place(from[i], int(s.head_dim)), new_place = key_place(to[i], int(s.head_dim));
      for (int64_t d = 0; d < s.head_dim; ++d) k[new_place + d * KEY_BLOCK] = k[old_place + d * KEY_BLOCK];
      std::memcpy(v + to[i] * s.head_dim, v + from[i] * s.head_dim, size_t(s.head_dim) * sizeof(Cache));
    }
}

}  // namespace
