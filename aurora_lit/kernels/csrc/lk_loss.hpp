// The LK acceptance loss and its gradient, which overwrites the draft's logits (formulas: modules/losses/lk.py). One
// row of a draft vocabulary fits into the L2 cache, so its four passes read memory once.
//
// Shapes: K draft steps, C positions, D draft vocabulary.
#pragma once

#include <cmath>

#include "attention.hpp"

namespace {

inline void store16(uint16_t* to, f16v x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  for (int i = 0; i < 16; ++i) to[i] = to_bf16(x[i]);
#endif
}

inline void store16(float* to, f16v x) { std::memcpy(to, &x, sizeof x); }

inline float sum16(f16v x) {
  float total = 0.0f;
  for (int i = 0; i < 16; ++i) total += x[i];
  return total;
}

// The largest of D values, and the index of its first occurrence.
template <class Number>
float largest(const Number* x, int D, int64_t* where) {
  f16v tops = f16v{} - 3.0e38f;
  for (int d = 0; d < D; d += 16) {
    const f16v v = load16(x + d);
    tops = v > tops ? v : tops;
  }
  float top = tops[0];
  for (int i = 1; i < 16; ++i) top = tops[i] > top ? tops[i] : top;
  int d = 0;
  while (d < D - 1 && load(x + d) != top) ++d;
  *where = d;
  return top;
}

template <class Number>
struct LKRows {
  Number* draft;           // [K, C, D] in: logits; out: d loss / d logits
  const Number* target;    // [C, D] logits
  const float* target_lse; // [C] log-sum-exp of the target's logits over its whole vocabulary
  const float* weight;     // [K, C] of each row in the loss
  const float* gain;       // [K, C] by which 1 - alpha is multiplied
  const int64_t* top;      // [C] the target's top token; or null: the largest of its logits
  int64_t K, C, D;         // D: a multiple of 16
  float decay;             // of the share of KL: exp(-decay * alpha)
  float* loss;             // [K, C] out, weighted
  float* alpha;            // [K, C] out: acceptance probability
  float* kl;               // [K, C] out: KL divergence
  uint8_t* match;          // [K, C] out: draft and target have the same top token
};

template <class Number>
void lk_rows(const LKRows<Number>& s) {
  const int D = int(s.D);
#pragma omp parallel
  {
    static thread_local std::vector<float> buffer;
    if (buffer.size() < size_t(2 * D)) buffer.resize(size_t(2 * D));
    float *p = buffer.data(), *q = p + D;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.C; ++c) {
      const Number* t = s.target + c * D;
      int64_t top_p = 0;
      if (s.top) top_p = s.top[c];
      else largest(t, D, &top_p);
      f16v sums = f16v{}, dots = f16v{};
      for (int d = 0; d < D; d += 16) {
        const f16v log_p = load16(t + d) - s.target_lse[c], v = exp_vector(log_p);
        std::memcpy(p + d, &v, 64);
        sums += v;
        dots = fused(v, log_p, dots);
      }
      const float p_sum = sum16(sums), p_log_p = sum16(dots);
      for (int64_t k = 0; k < s.K; ++k) {
        const int64_t at = k * s.C + c;
        Number* z = s.draft + at * D;
        int64_t top_q = 0;
        const float z_top = largest(z, D, &top_q);
        f16v total = f16v{}, p_z = f16v{};
        for (int d = 0; d < D; d += 16) {
          const f16v v = load16(z + d), e = exp_vector(v - z_top);
          std::memcpy(q + d, &e, 64);
          total += e;
          p_z = fused(load16(p + d), v, p_z);
        }
        const float sum = sum16(total), inverse = 1.0f / sum;
        f16v accepted = f16v{}, below = f16v{};
        for (int d = 0; d < D; d += 16) {
          const f16v pv = load16(p + d), qv = load16(q + d) * inverse, zero = f16v{};
          accepted += qv < pv ? qv : pv;
          below += qv < pv ? qv : zero;
        }
        const float alpha = sum16(accepted), q_below = sum16(below);
        const float kl = p_log_p - sum16(p_z) + p_sum * (z_top + std::log(sum));
        const float share = std::exp(-s.decay * alpha), w = s.weight[at];
        s.alpha[at] = alpha;
        s.kl[at] = kl;
        s.match[at] = top_q == top_p;
        // dz = q [λs + (1 − λ)(Σ m·q − m)] − λp with m = 1[q < p]
        const float kl_part = w * share, alpha_part = w * (1.0f - share) * s.gain[at];
        s.loss[at] = kl_part * kl + alpha_part * (1.0f - alpha);
        const float base = kl_part * p_sum + alpha_part * q_below;
        for (int d = 0; d < D; d += 16) {
          const f16v pv = load16(p + d), qv = load16(q + d) * inverse;
          const f16v high = f16v{} + base, low = f16v{} + (base - alpha_part);
          store16(z + d, qv * (qv < pv ? low : high) - pv * kl_part);
        }
      }
    }
  }
}

}  // namespace
