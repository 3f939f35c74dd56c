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

template <class Cache>
void attention(const AttentionShape& s, const float* q, const float* k, const float* v, Cache* keys, Cache* values,
               const int64_t* slots, const int64_t* starts, float* out) {
  const int D = int(s.head_dim);
  for (int64_t b = 0; b < s.rows; ++b)
    for (int64_t g = 0; g < s.kv_heads; ++g)
      for (int64_t t = 0; t < s.queries; ++t) {
        const int64_t at = starts[b] + t;
        const float* kt = k + b * s.k_row + g * s.k_head + t * s.k_token;
        const float* vt = v + b * s.v_row + g * s.v_head + t * s.v_token;
        Cache* kc = keys + slots[b] * s.cache_row_k + g * s.cache_head_k + at;
        Cache* vc = values + slots[b] * s.cache_row_v + g * s.cache_head_v + at * D;
        for (int d = 0; d < D; ++d) store(kc + d * s.cache_dim_k, kt[d]);
        for (int d = 0; d < D; ++d) store(vc + d, vt[d]);
      }
  const int64_t group = s.heads / s.kv_heads;
  const int64_t tiles = (s.queries + 15) / 16;
#pragma omp parallel
  {
    std::vector<float> scores;
#pragma omp for schedule(dynamic, 1)
    for (int64_t job = 0; job < s.rows * s.heads * tiles; ++job) {
      const int64_t tile = job % tiles, h = job / tiles % s.heads, b = job / tiles / s.heads, g = h / group;
      const int64_t last = (tile + 1) * 16 < s.queries ? (tile + 1) * 16 : s.queries;
      const Cache* kc = keys + slots[b] * s.cache_row_k + g * s.cache_head_k;
      const Cache* vc = values + slots[b] * s.cache_row_v + g * s.cache_head_v;
      for (int64_t t = tile * 16; t < last; ++t) {
        const float* qt = q + b * s.q_row + h * s.q_head + t * s.q_token;
        const int64_t length = starts[b] + t + 1, padded = (length + 31) / 32 * 32;
        if (int64_t(scores.size()) < padded) scores.resize(size_t(padded) * 2);
        float* sc = scores.data();
        float top = -3.0e38f;
        for (int64_t p = 0; p < padded; p += 32) {
          f16v a0 = f16v{}, a1 = f16v{};
          for (int d = 0; d < D; ++d) {
            const Cache* row = kc + d * s.cache_dim_k + p;
            a0 += qt[d] * load16(row);
            a1 += qt[d] * load16(row + 16);
          }
          a0 *= s.scale;
          a1 *= s.scale;
          std::memcpy(sc + p, &a0, 64);
          std::memcpy(sc + p + 16, &a1, 64);
        }
        for (int64_t p = length; p < padded; ++p) sc[p] = -3.0e38f;
        for (int64_t p = 0; p < length; ++p) top = sc[p] > top ? sc[p] : top;
        f16v sums = f16v{};
        for (int64_t p = 0; p < padded; p += 16) {
          f16v e = exp_vector(load16(sc + p) - top);
          std::memcpy(sc + p, &e, 64);
        }
        for (int64_t p = length; p < padded; ++p) sc[p] = 0.0f;
        for (int64_t p = 0; p < padded; p += 16) sums += load16(sc + p);
        float total = 0.0f;
        for (int i = 0; i < 16; ++i) total += sums[i];
        const float inverse = 1.0f / total;
        float* ot = out + ((b * s.queries + t) * s.heads + h) * D;
        for (int d = 0; d < D; d += 32) {
          f16v o0 = f16v{}, o1 = f16v{};
          for (int64_t p = 0; p < length; ++p) {
            o0 += sc[p] * load16(vc + p * D + d);
            o1 += sc[p] * load16(vc + p * D + d + 16);
          }
          o0 *= inverse;
          o1 *= inverse;
          std::memcpy(ot + d, &o0, 64);
          std::memcpy(ot + d + 16, &o1, 64);
        }
      }
    }
  }
}

}  // namespace
