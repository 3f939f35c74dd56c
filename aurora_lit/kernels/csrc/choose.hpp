// Choosing a token for each row of a product while it is computed: the most probable one, or one that is drawn. A token
// is drawn as the argmax of logit / temperature + Gumbel noise (noise.hpp). Other rows' outputs are stored, and a token
// is chosen from them afterwards (sampler.hpp). No row's token depends on the other rows or on the number of threads.
#pragma once

#include "noise.hpp"
#include "top_k.hpp"

namespace {

// How to choose for each of N rows.
struct Draws {
  const float* temperatures;  // 0: the largest output
  const int64_t* keys;        // of the noise
  const int64_t* positions;   // index in the output of the token to choose
  const int64_t* dense;       // row of `dense_logits` where the outputs are stored and none is chosen, or -1; or null:
                              // -1 for all
  float* dense_logits;        // [rows, outputs] out
  int64_t* tokens;            // [N] out; 0 where none is chosen
};

// Raise `best` to the best of a block of `width` outputs by output * inverse + noise.
//
// Logarithms are taken only where a token may win. With E = -log1p(-v) the noise is -log(E), so a token wins only if
// E < exp(z - best), and E >= v. The margin covers rounding, so the result never depends on what `best` was before. The
// two halves are computed side by side, because each is a long chain of dependent instructions.
inline void choose_of_block(const float* y, int width, float inverse, const NoiseKey& key, int64_t first, Top* best) {
  float padded[BLOCK];
  if (width < BLOCK) {
    for (int i = 0; i < BLOCK; ++i) padded[i] = i < width ? y[i] : -INFINITY;
    y = padded;
  }
  f16v z[2], v[2], bound[2];
  for (int half = 0; half < 2; ++half) {
    z[half] = load16(y + 16 * half) * inverse;
    const f16v none = f16v{}, above = z[half] - best->value;
    bound[half] = exp_vector(above < none ? above : none) * 1.0001f;
    v[half] = uniform_of(noise_bits(key, tokens_from(uint32_t(first) + 16u * half)));
  }
  for (int half = 0; half < 2; ++half) {
    if (!any_less(v[half], bound[half])) continue;
    const f16v perturbed = z[half] + gumbel_of(v[half]);
    for (int i = 0; i < 16; ++i) insert_top(best, 1, Top{perturbed[i], first + 16 * half + i});
  }
}

// Choose a token for each row of x times a packed weight.
template <class Format>
void multiply_choose(const float* x, ptrdiff_t x_stride, int rows, const void* w, int inputs, int outputs,
                     const Draws& draws) {
  typedef Product<Format> P;
  const int k = P::padded(inputs), most_parts = omp_get_max_threads();
  static thread_local Buffer<typename Format::Input> rounded;
  static thread_local Buffer<NoiseKey> all_keys;
  static thread_local Buffer<Top> all_tops;
  typename Format::Input* to = rounded.at_least(P::buffer_rows(rows) * k);
  NoiseKey* keys = all_keys.at_least(size_t(rows));
  Top* parts = all_tops.at_least(size_t(most_parts) * rows);  // each thread has its own
  for (int r = 0; r < rows; ++r) {
    P::round_row(x + r * x_stride, inputs, to, r, rows);
    keys[r] = noise_key(draws.keys[r], draws.positions[r]);
  }
  for (int i = 0; i < most_parts * rows; ++i) parts[i] = Top{-INFINITY, 0};
  each_block<Format>(to, k, rows, w, outputs, nullptr, num_blocks(outputs),
                     [=, &draws](int thread, int b, const float* y, int width) {
                       const int64_t first = int64_t(b) * BLOCK;
                       for (int r = 0; r < rows; ++r) {
                         const float* row = y + ptrdiff_t(r) * width;
                         Top* best = parts + ptrdiff_t(thread) * rows + r;
                         if (draws.dense && draws.dense[r] >= 0) {
                           std::memcpy(draws.dense_logits + draws.dense[r] * outputs + first, row,
                                       size_t(width) * sizeof(float));
                         } else if (draws.temperatures[r] > 0.0f) {
                           choose_of_block(row, width, 1.0f / draws.temperatures[r], keys[r], first, best);
                         } else if (width < BLOCK || largest(row) > best->value) {
                           for (int i = 0; i < width; ++i) insert_top(best, 1, Top{row[i], first + i});
                         }
                       }
                     });
  for (int r = 0; r < rows; ++r) {
    Top best{-INFINITY, 0};
    for (int part = 0; part < most_parts; ++part) insert_top(&best, 1, parts[ptrdiff_t(part) * rows + r]);
    draws.tokens[r] = best.index;
  }
}

}  // namespace
