// Two CPU kernels: a linear layer for few rows, and attention over a slot cache for few queries.
//
// Both are batch-invariant: every output is summed in one fixed order that does not depend on how many rows,
// queries or requests are computed together. Speculative and plain decoding therefore give bit-equal logits, in
// bf16 weights too. Weights lie as one sequential stream (blocks of 32 outputs, input index inside), because at
// one row the time of a linear layer is the time to read it.
//
// Compiled by kernels/native.py with -march=native. Vector types are the compiler's own, so other processors work
// as well; only the bf16 product has a branch for AVX512-BF16.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

typedef float f16v __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u16v __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16v __attribute__((vector_size(64), aligned(4)));

constexpr int BLOCK = 32;    // outputs of one block of packed weights: two vectors
constexpr int MAX_ROWS = 6;  // rows that share one read of a block

inline uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 64);  // stay NaN
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float from_bf16(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

struct Float {  // one input index a step
  typedef float Weight;
  typedef float Input;
  static constexpr int STEP = 1;
  static inline void step(const float* w, const float* const* x, int k, f16v (*acc)[2], int rows) {
    const f16v w0 = *reinterpret_cast<const f16v*>(w), w1 = *reinterpret_cast<const f16v*>(w + 16);
    for (int r = 0; r < rows; ++r) {
      acc[r][0] += x[r][k] * w0;
      acc[r][1] += x[r][k] * w1;
    }
  }
};

struct BFloat {  // two input indices a step, side by side in one 32-bit lane
  typedef uint16_t Weight;
  typedef uint16_t Input;
  static constexpr int STEP = 2;
  static inline void step(const uint16_t* w, const uint16_t* const* x, int k, f16v (*acc)[2], int rows) {
    for (int r = 0; r < rows; ++r) {
      uint32_t pair;
      std::memcpy(&pair, x[r] + k, 4);
#if defined(__AVX512BF16__)
      const __m512bh xb = (__m512bh)_mm512_set1_epi32(int(pair));
      acc[r][0] = (f16v)_mm512_dpbf16_ps((__m512)acc[r][0], (__m512bh)_mm512_loadu_si512(w), xb);
      acc[r][1] = (f16v)_mm512_dpbf16_ps((__m512)acc[r][1], (__m512bh)_mm512_loadu_si512(w + 32), xb);
#else
      const float lo = from_bf16(uint16_t(pair)), hi = from_bf16(uint16_t(pair >> 16));
      for (int v = 0; v < 2; ++v) {
        const u16v raw = *reinterpret_cast<const u16v*>(w + 32 * v);
        acc[r][v] += lo * (f16v)(raw << 16);
        acc[r][v] += hi * (f16v)(raw & 0xffff0000u);
      }
#endif
    }
  }
};

template <class Kind, int ROWS>
void block_rows(const typename Kind::Weight* w, const typename Kind::Input* x, ptrdiff_t x_stride, int k_padded,
                float* y, ptrdiff_t y_stride, int width, const float* bias) {
  f16v acc[ROWS][2];
  const typename Kind::Input* rows[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    acc[r][0] = acc[r][1] = f16v{};
    rows[r] = x + r * x_stride;
  }
  for (int k = 0; k < k_padded; k += Kind::STEP) Kind::step(w + ptrdiff_t(k) * BLOCK, rows, k, acc, ROWS);
  for (int r = 0; r < ROWS; ++r) {
    float out[BLOCK];
    std::memcpy(out, acc[r], sizeof out);
    float* row = y + r * y_stride;
    std::memcpy(row, out, size_t(width) * sizeof(float));
    for (int i = 0; bias && i < width; ++i) row[i] += bias[i];
  }
}

template <class Kind>
void linear(const typename Kind::Input* x, ptrdiff_t x_stride, int rows, const typename Kind::Weight* w, int k_padded,
            int outputs, float* y, const float* bias) {
  const int blocks = (outputs + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b) {
    const int first = b * BLOCK, width = outputs - first < BLOCK ? outputs - first : BLOCK;
    const typename Kind::Weight* wb = w + ptrdiff_t(b) * BLOCK * k_padded;
    const float* bb = bias ? bias + first : nullptr;
    for (int r = 0; r < rows; r += MAX_ROWS) {
      const int n = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
      const typename Kind::Input* xr = x + r * x_stride;
      float* yr = y + ptrdiff_t(r) * outputs + first;
      switch (n) {
        case 1: block_rows<Kind, 1>(wb, xr, x_stride, k_padded, yr, outputs, width, bb); break;
        case 2: block_rows<Kind, 2>(wb, xr, x_stride, k_padded, yr, outputs, width, bb); break;
        case 3: block_rows<Kind, 3>(wb, xr, x_stride, k_padded, yr, outputs, width, bb); break;
        case 4: block_rows<Kind, 4>(wb, xr, x_stride, k_padded, yr, outputs, width, bb); break;
        case 5: block_rows<Kind, 5>(wb, xr, x_stride, k_padded, yr, outputs, width, bb); break;
        default: block_rows<Kind, 6>(wb, xr, x_stride, k_padded, yr, outputs, width, bb); break;
      }
    }
  }
}

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

extern "C" {

int aurora_block() { return BLOCK; }

// weight [outputs, inputs] -> blocks of 32 outputs: [block][input][32]
void aurora_pack_fp32(const float* weight, int outputs, int inputs, float* packed) {
  const int blocks = (outputs + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b)
    for (int k = 0; k < inputs; ++k)
      for (int i = 0; i < BLOCK; ++i) {
        const int o = b * BLOCK + i;
        packed[(ptrdiff_t(b) * inputs + k) * BLOCK + i] = o < outputs ? weight[ptrdiff_t(o) * inputs + k] : 0.0f;
      }
}

// weight [outputs, inputs] -> [block][input pair][32][2]; `padded` is `inputs` rounded up to even
void aurora_pack_bf16(const float* weight, int outputs, int inputs, int padded, uint16_t* packed) {
  const int blocks = (outputs + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b)
    for (int k = 0; k < padded; ++k)
      for (int i = 0; i < BLOCK; ++i) {
        const int o = b * BLOCK + i;
        const float w = o < outputs && k < inputs ? weight[ptrdiff_t(o) * inputs + k] : 0.0f;
        packed[(ptrdiff_t(b) * padded + k / 2 * 2) * BLOCK + i * 2 + k % 2] = to_bf16(w);
      }
}

// y [rows, outputs] = x [rows, inputs] times packed weight
void aurora_linear_fp32(const float* x, int64_t x_stride, int rows, const float* packed, int inputs, int outputs,
                        float* y, const float* bias) {
  linear<Float>(x, x_stride, rows, packed, inputs, outputs, y, bias);
}

// the same with bf16 weights; inputs are rounded to bf16, sums stay fp32
void aurora_linear_bf16(const float* x, int64_t x_stride, int rows, const uint16_t* packed, int inputs, int outputs,
                        float* y, const float* bias) {
  const int padded = (inputs + 1) / 2 * 2;
  static thread_local std::vector<uint16_t> rounded;
  if (rounded.size() < size_t(rows) * padded) rounded.resize(size_t(rows) * padded);
  uint16_t* to = rounded.data();
  for (int r = 0; r < rows; ++r) {
    const float* from = x + r * x_stride;
    uint16_t* row = to + ptrdiff_t(r) * padded;
    int k = 0;
#if defined(__AVX512BF16__)
    for (; k + 16 <= inputs; k += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + k), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + k)));
#endif
    for (; k < inputs; ++k) row[k] = to_bf16(from[k]);
    for (; k < padded; ++k) row[k] = 0;
  }
  linear<BFloat>(to, padded, rows, packed, padded, outputs, y, bias);
}

void aurora_attention_fp32(const AttentionShape* shape, const float* q, const float* k, const float* v, float* keys,
                           float* values, const int64_t* slots, const int64_t* starts, float* out) {
  attention<float>(*shape, q, k, v, keys, values, slots, starts, out);
}

void aurora_attention_bf16(const AttentionShape* shape, const float* q, const float* k, const float* v, uint16_t* keys,
                           uint16_t* values, const int64_t* slots, const int64_t* starts, float* out) {
  attention<uint16_t>(*shape, q, k, v, keys, values, slots, starts, out);
}

}  // extern "C"
