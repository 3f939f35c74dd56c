// Attention over a slot cache for few queries. Every output is summed in one fixed order, whatever the batch.
#pragma once

#include "words.hpp"

namespace {

inline void store(float* to, float x) { *to = x; }
inline void store(uint16_t* to, float x) { *to = to_bf16(x); }
inline float load(const float* from) { return *from; }
inline float load(const uint16_t* from) { return from_bf16(*from); }
inline f16v load16(const float* from) { return *reinterpret_cast<const f16v*>(from); }
inline f16v load16(const uint16_t* from) { return (f16v)(widen16(from) << 16); }

struct AttentionShape {
  int64_t rows, queries, heads, kv_heads, head_dim;
  int64_t q_row, q_head, q_token;           // strides of the query, in elements
  int64_t k_row, k_head, k_token;           // of the new keys
  int64_t v_row, v_head, v_token;           // of the new values
  int64_t cache_row_k, cache_head_k;        // of the key slots [slot, head, block, dim, position of the block]
  int64_t cache_row_v, cache_head_v;        // of the value slots [slot, head, position, dim]
  float scale;
  const int64_t* begins;  // [rows + 1]: where each row's queries begin, `queries` being the most a row has; or null

  int64_t queries_of(int64_t row) const { return begins ? begins[row + 1] - begins[row] : queries; }
  int64_t first_of(int64_t row) const { return begins ? begins[row] : row * queries; }
};

constexpr int KEY_BLOCK = 64;  // positions whose keys lie together, so that they are read as one stream

// Where the key of a position lies in its head's slot; its dims are KEY_BLOCK apart.
inline int64_t key_place(int64_t position, int D) {
  return position / KEY_BLOCK * KEY_BLOCK * D + position % KEY_BLOCK;
}

// Proposals that branch. They lie behind a row's start in `columns` columns, of which the pass computes the last
// `queries`; a column follows its parent, or where that is negative what stands before the start. It attends to the
// start's positions and its ancestors, in the order in which they would stand there without the others.
struct Tree {
  const int64_t* parents;  // [rows, columns], each below its column; or null: each column follows the one before
  int64_t columns;
};

constexpr int MAX_PATH = 32;

// One query of one head: what it asks, how many positions it sees, where its answer goes, its scores. The last `steps`
// of its positions are columns of a tree: `path`, counted from where they begin.
struct Query {
  const float* q;
  int64_t length;
  float* out;
  float* scores;
  int64_t extent;  // positions to score, so that all of the path are
  int steps;
  int path[MAX_PATH];
};

// Columns from the one that follows the start down to `column`; returns how many.
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

// Scores of ROWS queries over the positions of their head from 0 to `positions`, whole blocks; then come the values.
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

// Values weighed by the scores, WIDTH vectors of a head at a time; the first `shared` positions are those of all rows.
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
      const int64_t together = rows[r].length - rows[r].steps;
      for (int64_t p = shared; p < rows[r].length; ++p) {
        const int64_t at = p < together ? p : together + rows[r].path[p - together];
        for (int v = 0; v < WIDTH; ++v) acc[r][v] += rows[r].scores[p] * load16(values + at * D + d + 16 * v);
      }
      for (int v = 0; v < WIDTH; ++v) {
        acc[r][v] *= inverse[r];
        std::memcpy(rows[r].out + d + 16 * v, &acc[r][v], 64);
      }
    }
  }
}

// ROWS queries over the same keys and values, so that these are loaded and widened once. Every row has sums of its own,
// added up in the order of positions, so that neither ROWS nor how many vectors go together changes a bit of it.
template <class Cache, int ROWS>
void attend_rows(const Query* rows, const Cache* keys, const Cache* values, int D, float scale) {
  int64_t longest = 0, shared = rows[0].length;
  for (int r = 0; r < ROWS; ++r) {
    const int64_t together = rows[r].length - rows[r].steps;
    longest = rows[r].extent > longest ? rows[r].extent : longest;
    shared = together < shared ? together : shared;
  }
  score_rows<Cache, ROWS>(rows, keys, values, whole_blocks(longest), D, scale);
  float inverse[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    float* behind = rows[r].scores + rows[r].length - rows[r].steps;
    for (int i = 0; i < rows[r].steps; ++i) behind[i] = behind[rows[r].path[i]];  // i <= path[i], both ascend
    inverse[r] = 1.0f / exponentiate(rows[r].scores, rows[r].length, whole_blocks(rows[r].length));
  }
  if (D % 64 == 0)
    weigh_rows<Cache, ROWS, 4>(rows, inverse, values, shared, D);
  else
    weigh_rows<Cache, ROWS, 2>(rows, inverse, values, shared, D);
}

#if defined(__AVX512F__)
constexpr int MAX_QUERIES = 6;  // that share one reading of keys and values: their sums fill the registers
#else
constexpr int MAX_QUERIES = 3;
#endif

template <class Cache, int ROWS = MAX_QUERIES>
void attend_queries(const Query* rows, int count, const Cache* keys, const Cache* values, int D, float scale) {
  if constexpr (ROWS > 1)
    if (count < ROWS) return attend_queries<Cache, ROWS - 1>(rows, count, keys, values, D, scale);
  attend_rows<Cache, ROWS>(rows, keys, values, D, scale);
}

// Where a row begins in a tensor of these strides; rows with queries of their own number lie one behind the other.
inline int64_t row_at(const AttentionShape& s, int64_t b, int64_t row, int64_t token) {
  return s.begins ? s.begins[b] * token : b * row;
}

// Write new keys and values of one row and key-value head, those of tokens [from, to), behind the row's start.
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

// Attend causally over what is written: a share of a parallel region, which waits for all shares at the end.
// Queries that share keys go together: those of a group's heads, for neighbouring tokens.
template <class Cache>
void attend_share(const AttentionShape& s, const float* q, const Cache* keys, const Cache* values,
                  const int64_t* slots, const int64_t* starts, const Tree& tree, float* out) {
  const int D = int(s.head_dim);
  const int64_t before = tree.parents ? tree.columns - s.queries : 0;  // columns that earlier passes computed
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

// Copy position from[i] of slot slots[i] to position to[i], for all heads, one copy after the other.
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
