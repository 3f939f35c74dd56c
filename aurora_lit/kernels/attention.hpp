// Attention over a slot cache for few queries. Every output is summed in one fixed order, whatever the batch.
#pragma once

#include "words.hpp"

namespace {

// exp(x) for x <= 0, relative error below 2e-7: 2^n * polynomial (Cephes' expf).
inline f16v exp_vector(f16v x) {
  const f16v lowest = f16v{} - 87.0f;
  x = x < lowest ? lowest : x;
  const f16v shifter = f16v{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest whole number
  const f16v n = (x * 1.44269504088896341f + shifter) - shifter;
  const f16v r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  f16v p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const i16v scale = (__builtin_convertvector(n, i16v) + 127) << 23;
  return p * (f16v)scale;
}

inline void store(float* to, float x) { *to = x; }
inline void store(uint16_t* to, float x) { *to = to_bf16(x); }
inline f16v load16(const float* from) { return *reinterpret_cast<const f16v*>(from); }
inline f16v load16(const uint16_t* from) {
  typedef uint16_t h16v __attribute__((vector_size(32), aligned(2)));
  return (f16v)(__builtin_convertvector(*reinterpret_cast<const h16v*>(from), u16v) << 16);
}

struct AttentionShape {
  int64_t rows, queries, heads, kv_heads, head_dim;
  int64_t q_row, q_head, q_token;           // strides of the query, in elements
  int64_t k_row, k_head, k_token;           // of the new keys
  int64_t v_row, v_head, v_token;           // of the new values
  int64_t cache_row_k, cache_head_k, cache_dim_k;  // of the key slots [slot, head, dim, position]
  int64_t cache_row_v, cache_head_v;        // of the value slots [slot, head, position, dim]
  float scale;
};

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

inline int64_t padded64(int64_t length) { return (length + 63) / 64 * 64; }

// Softmax numerators in place over `length` scores, zeros up to `padded`; returns the sum.
inline float exponentiate(float* scores, int64_t length, int64_t padded) {
  for (int64_t p = length; p < padded; ++p) scores[p] = -3.0e38f;
  f16v tops = f16v{} - 3.0e38f;
  for (int64_t p = 0; p < padded; p += 16) {
    const f16v x = load16(scores + p);
    tops = x > tops ? x : tops;
  }
  float top = tops[0];
  for (int i = 1; i < 16; ++i) top = tops[i] > top ? tops[i] : top;
  for (int64_t p = 0; p < padded; p += 16) {
    const f16v e = exp_vector(load16(scores + p) - top);
    std::memcpy(scores + p, &e, 64);
  }
  for (int64_t p = length; p < padded; ++p) scores[p] = 0.0f;
  f16v sums = f16v{};
  for (int64_t p = 0; p < padded; p += 16) sums += load16(scores + p);
  float total = 0.0f;
  for (int i = 0; i < 16; ++i) total += sums[i];
  return total;
}

// ROWS queries over the same keys and values, so that these are loaded and widened once. Every row has sums of its own,
// added up in the order of positions, so that neither ROWS nor WIDTH (vectors a step) changes a bit of it.
template <class Cache, int ROWS, int WIDTH>
void attend_rows(const Query* rows, const Cache* keys, ptrdiff_t key_stride, const Cache* values, int D, float scale) {
  int64_t longest = 0, shortest = rows[0].length;
  for (int r = 0; r < ROWS; ++r) {
    const int64_t together = rows[r].length - rows[r].steps;
    longest = rows[r].extent > longest ? rows[r].extent : longest;
    shortest = together < shortest ? together : shortest;
  }
  for (int64_t p = 0; p < padded64(longest); p += 16 * WIDTH) {
    f16v acc[ROWS][WIDTH] = {};
    for (int d = 0; d < D; ++d) {
      f16v key[WIDTH];
      for (int v = 0; v < WIDTH; ++v) key[v] = load16(keys + d * key_stride + p + 16 * v);
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < WIDTH; ++v) acc[r][v] += rows[r].q[d] * key[v];
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < WIDTH; ++v) {
        acc[r][v] *= scale;
        std::memcpy(rows[r].scores + p + 16 * v, &acc[r][v], 64);
      }
  }
  for (int r = 0; r < ROWS; ++r) {
    float* behind = rows[r].scores + rows[r].length - rows[r].steps;
    for (int i = 0; i < rows[r].steps; ++i) behind[i] = behind[rows[r].path[i]];  // i <= path[i], both ascend
  }
  float inverse[ROWS];
  for (int r = 0; r < ROWS; ++r)
    inverse[r] = 1.0f / exponentiate(rows[r].scores, rows[r].length, padded64(rows[r].length));
  for (int d = 0; d < D; d += 16 * WIDTH) {
    f16v acc[ROWS][WIDTH] = {};
    for (int64_t p = 0; p < shortest; ++p) {
      f16v value[WIDTH];
      for (int v = 0; v < WIDTH; ++v) value[v] = load16(values + p * D + d + 16 * v);
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < WIDTH; ++v) acc[r][v] += rows[r].scores[p] * value[v];
    }
    for (int r = 0; r < ROWS; ++r) {
      const int64_t together = rows[r].length - rows[r].steps;
      for (int64_t p = shortest; p < rows[r].length; ++p) {
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

constexpr int MAX_QUERIES = 4;  // that share one reading of keys and values

template <class Cache>
void attend_queries(const Query* rows, int count, const Cache* keys, ptrdiff_t key_stride, const Cache* values, int D,
                    float scale) {
  const bool wide = D % 64 == 0;
  switch (count) {
    case 1: return (wide ? attend_rows<Cache, 1, 4> : attend_rows<Cache, 1, 2>)(rows, keys, key_stride, values, D, scale);
    case 2: return (wide ? attend_rows<Cache, 2, 4> : attend_rows<Cache, 2, 2>)(rows, keys, key_stride, values, D, scale);
    case 3: return (wide ? attend_rows<Cache, 3, 4> : attend_rows<Cache, 3, 2>)(rows, keys, key_stride, values, D, scale);
    default: return (wide ? attend_rows<Cache, 4, 4> : attend_rows<Cache, 4, 2>)(rows, keys, key_stride, values, D, scale);
  }
}

// Write the new keys and values of one row and key-value head behind the row's start.
template <class Cache>
void write_slot(const AttentionShape& s, int64_t b, int64_t g, const float* k, const float* v, Cache* keys,
                Cache* values, const int64_t* slots, const int64_t* starts, const Tree& tree) {
  const int D = int(s.head_dim);
  const int64_t first = tree.parents ? tree.columns - s.queries : 0;
  for (int64_t t = 0; t < s.queries; ++t) {
    const int64_t at = starts[b] + first + t;
    const float* kt = k + b * s.k_row + g * s.k_head + t * s.k_token;
    const float* vt = v + b * s.v_row + g * s.v_head + t * s.v_token;
    Cache* kc = keys + slots[b] * s.cache_row_k + g * s.cache_head_k + at;
    Cache* vc = values + slots[b] * s.cache_row_v + g * s.cache_head_v + at * D;
    for (int d = 0; d < D; ++d) store(kc + d * s.cache_dim_k, kt[d]);
    for (int d = 0; d < D; ++d) store(vc + d, vt[d]);
  }
}

// Attend causally over what is written: a share of a parallel region, which waits for all shares at the end.
// Queries that share keys go together: neighbouring tokens of a head, or at one token the heads of a group.
template <class Cache>
void attend_share(const AttentionShape& s, const float* q, const Cache* keys, const Cache* values,
                  const int64_t* slots, const int64_t* starts, const Tree& tree, float* out) {
  const int D = int(s.head_dim);
  const int64_t before = tree.parents ? tree.columns - s.queries : 0;  // columns that earlier passes computed
  const int64_t group = s.heads / s.kv_heads;
  const bool by_token = s.queries > 1 || s.rows * s.kv_heads < 4;
  const int64_t tiles = by_token ? (s.queries + 15) / 16 : 1, lanes = by_token ? s.heads : s.kv_heads;
  static thread_local std::vector<float> scores;
#pragma omp for schedule(dynamic, 1)
  for (int64_t job = 0; job < s.rows * lanes * tiles; ++job) {
    const int64_t tile = job % tiles, lane = job / tiles % lanes, b = job / tiles / lanes;
    const int64_t g = by_token ? lane / group : lane;
    const Cache* kc = keys + slots[b] * s.cache_row_k + g * s.cache_head_k;
    const Cache* vc = values + slots[b] * s.cache_row_v + g * s.cache_head_v;
    const int64_t first = by_token ? tile * 16 : g * group;
    const int64_t last = by_token ? (first + 16 < s.queries ? first + 16 : s.queries) : first + group;
    const int64_t room = padded64(starts[b] + before + s.queries);
    if (int64_t(scores.size()) < room * MAX_QUERIES) scores.resize(size_t(room * MAX_QUERIES));
    for (int64_t i = first; i < last; i += MAX_QUERIES) {
      const int count = int(last - i < MAX_QUERIES ? last - i : MAX_QUERIES);
      Query rows[MAX_QUERIES];
      for (int r = 0; r < count; ++r) {
        const int64_t t = by_token ? i + r : 0, h = by_token ? lane : i + r;
        rows[r].q = q + b * s.q_row + h * s.q_head + t * s.q_token;
        rows[r].out = out + ((b * s.queries + t) * s.heads + h) * D;
        rows[r].scores = scores.data() + room * r;
        rows[r].extent = starts[b] + before + t + 1;
        rows[r].steps = tree.parents ? path_to(tree.parents + b * tree.columns, before + t, rows[r].path) : 0;
        rows[r].length = tree.parents ? starts[b] + rows[r].steps : rows[r].extent;
      }
      attend_queries(rows, count, kc, s.cache_dim_k, vc, D, s.scale);
    }
  }
}

template <class Cache>
void attention(const AttentionShape& s, const float* q, const float* k, const float* v, Cache* keys, Cache* values,
               const int64_t* slots, const int64_t* starts, float* out) {
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t job = 0; job < s.rows * s.kv_heads; ++job)
      write_slot(s, job / s.kv_heads, job % s.kv_heads, k, v, keys, values, slots, starts, Tree{});
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
      for (int64_t d = 0; d < s.head_dim; ++d) k[d * s.cache_dim_k + to[i]] = k[d * s.cache_dim_k + from[i]];
      std::memcpy(v + to[i] * s.head_dim, v + from[i] * s.head_dim, size_t(s.head_dim) * sizeof(Cache));
    }
}

}  // namespace
