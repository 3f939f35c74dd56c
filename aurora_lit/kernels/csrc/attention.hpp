// Attention over the KV cache: writing new keys and values, attending, moving the accepted columns of a tree.
#pragma once

#include "attention_prompt.hpp"
#include "attention_tiles.hpp"
#include "attention_vectors.hpp"

namespace {

// Write the new keys and values of tokens [from, to) of one row and key-value head after the row's start.
template <class Cache>
void write_slot(const AttentionShape& s, int64_t b, int64_t g, const float* k, const float* v, Cache* keys,
                Cache* values, const int64_t* slots, const int64_t* starts, int64_t from, int64_t to) {
  const int D = int(s.head_dim);
  Cache* kc = keys + slots[b] * s.cache_row_k + g * s.cache_head_k;
  Cache* vc = values + slots[b] * s.cache_row_v + g * s.cache_head_v;
  for (int64_t t = from; t < to; ++t) {
    const int64_t at = starts[b] + t;
    const float* kt = k + row_at(s, b, s.k_row, s.k_token) + g * s.k_head + t * s.k_token;
    const float* vt = v + row_at(s, b, s.v_row, s.v_token) + g * s.v_head + t * s.v_token;
#if defined(AURORA_TILES)
    if constexpr (sizeof(Cache) == 2)
      if (s.pair == 2) {
        write_pairs(kt, vt, at, D, kc, vc);
        continue;
      }
#endif
    for (int d = 0; d < D; ++d) store(kc + key_at(at, D, 1) + d * KEY_BLOCK, kt[d]);
    for (int d = 0; d < D; ++d) store(vc + value_at(at, D, 1) + d, vt[d]);
  }
}

// Causal attention over the cache, called by all threads of a parallel region; they synchronise at the end. `shared` is
// made by `shared_tiles` before the region.
template <class Cache>
void attend_share(const AttentionShape& s, const float* q, const Cache* keys, const Cache* values,
                  const int64_t* slots, const int64_t* starts, const Tree& tree, const SharedTiles& shared,
                  float* out) {
#if defined(AURORA_TILES)
  if constexpr (sizeof(Cache) == 2)
    if (s.pair == 2) {
      if (s.num_prompts < s.rows) attend_tiles(s, q, keys, values, slots, starts, tree, shared, out);
      if (s.num_prompts) attend_prompts(s, q, keys, values, slots, starts, out);
#pragma omp barrier
      return;
    }
#endif
  attend_vectors(s, q, keys, values, slots, starts, tree, out);
}

// Write new keys and values, then attend, on all threads.
template <class Cache>
void attention(const AttentionShape& s, const float* q, const float* k, const float* v, Cache* keys, Cache* values,
               const int64_t* slots, const int64_t* starts, float* out) {
  const SharedTiles shared = shared_tiles(s, starts);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t job = 0; job < s.rows * s.kv_heads; ++job)
      write_slot(s, job / s.kv_heads, job % s.kv_heads, k, v, keys, values, slots, starts, 0, s.queries);
    attend_share(s, q, keys, values, slots, starts, Tree{}, shared, out);
  }
}

// Copy position from[i] of slot slots[i] to position to[i], for all heads, one copy after another.
template <class Cache>
void move_positions(const AttentionShape& s, Cache* keys, Cache* values, const int64_t* slots, const int64_t* from,
                    const int64_t* to, int64_t count) {
  const int64_t D = s.head_dim, pair = s.pair;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t g = 0; g < s.kv_heads; ++g) {
      Cache* k = keys + slots[i] * s.cache_row_k + g * s.cache_head_k;
      Cache* v = values + slots[i] * s.cache_row_v + g * s.cache_head_v;
      const int64_t new_key = key_at(to[i], D, pair), old_key = key_at(from[i], D, pair);
      const int64_t new_value = value_at(to[i], D, pair), old_value = value_at(from[i], D, pair);
      for (int64_t d = 0; d < D; ++d) {
        const int64_t dim = d / pair * pair * KEY_BLOCK + d % pair;
        k[new_key + dim] = k[old_key + dim];
        v[new_value + d * pair] = v[old_value + d * pair];
      }
    }
}

}  // namespace
