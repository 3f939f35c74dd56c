// Choosing a token for each row of a product while it is computed: the most probable one, or one that is drawn. A token
// is drawn as the argmax of logit / temperature + Gumbel noise (noise.hpp); of equal ones the first is chosen. Other rows'
// outputs are stored, and a token is chosen from them afterwards (sampler.hpp). No row's token depends on the other rows,
// on the number of threads, or on the order of the outputs.
#pragma once

#include "noise.hpp"
#include "top_k.hpp"

namespace {

// How to choose for each of N rows.
struct Draws {
  const float* temperatures;  // 0: the largest output; or null: 0 for all
  const int64_t* keys;        // of the noise
  const int64_t* positions;   // index in the output of the token to choose
  const int64_t* dense;       // row of `dense_logits` where the outputs are stored and none is chosen, or -1; or null:
                              // -1 for all
  float* dense_logits;        // [rows, outputs] out
  int64_t* tokens;            // [N] out; 0 where none is chosen
};

// Uniform numbers v whose noise may raise an output at z to a sum of at least `best` are less than this. With
// E = -log1p(-v) the noise is -log(E), so that needs E <= exp(z - best), and E >= v. The margins cover rounding.
inline f16v largest_uniform(f16v z, float best) {
  const f16v none = f16v{}, size = (f16v)((u16v)z & 0x7fffffffu);
  const f16v above = z - best + (size < INFINITY ? size * 0x1p-21f : none);
  return exp_vector(above < none ? above : none) * 1.0001f;
}

// Raise `best` to the best of a block of `width` outputs by output * inverse + noise.
//
// Logarithms are taken only where a token may win, so the result does not depend on what `best` was before. The two halves
// are computed side by side, because each is a long chain of dependent instructions.
inline void choose_of_block(const float* y, int width, float inverse, const NoiseKey& key, int64_t first, Top* best) {
  float padded[BLOCK];
  if (width < BLOCK) {
    for (int i = 0; i < BLOCK; ++i) padded[i] = i < width ? y[i] : -INFINITY;
    y = padded;
  }
  f16v z[2], v[2], bound[2];
  for (int half = 0; half < 2; ++half) {
    z[half] = load16(y + 16 * half) * inverse;
    bound[half] = largest_uniform(z[half], best->value);
    v[half] = uniform_of(noise_bits(key, tokens_from(uint32_t(first) + 16u * half)));
  }
  for (int half = 0; half < 2; ++half) {
    if (!any_less(v[half], bound[half])) continue;
    const f16v perturbed = z[half] + gumbel_of(v[half]);
    for (int i = 0; i < 16; ++i) insert_top(best, 1, Top{perturbed[i], first + 16 * half + i});
  }
}

// How the token of a row is chosen.
struct Choice {
  float inverse;  // of the temperature; 0: the largest output
  NoiseKey key;

  // Of row r.
  static Choice of(const Draws& draws, int r) {
    const bool draws_it = draws.temperatures && draws.temperatures[r] > 0.0f;
    return draws_it ? Choice{1.0f / draws.temperatures[r], noise_key(draws.keys[r], draws.positions[r])} : Choice{};
  }
  // Raise `best` to the best of a block.
  void raise(const float* y, int width, int64_t first, Top* best) const {
    if (inverse > 0.0f) return choose_of_block(y, width, inverse, key, first, best);
    if (width == BLOCK && largest(y) < best->value) return;
    for (int i = 0; i < width; ++i) insert_top(best, 1, Top{y[i], first + i});
  }
};

// Raise each row's `best` to the best of some blocks, and store outputs that are asked for. `chosen`: numbers of `count`
// blocks, or null for the first `count` blocks. x: inputs that are already rounded.
template <class Format>
void choose_of_blocks(const typename Format::Input* x, int k, int rows, const void* w, int outputs, const int* chosen,
                      int count, const Draws& draws, const Choice* choices, Top* best) {
  static thread_local Buffer<Top> all_tops;
  const int most_parts = omp_get_max_threads();
  Top* parts = all_tops.at_least(size_t(most_parts) * rows);  // each thread has its own
  for (int i = 0; i < most_parts * rows; ++i) parts[i] = best[i % rows];
  each_block<Format>(x, k, rows, w, outputs, chosen, count, [=, &draws](int thread, int b, const float* y, int width) {
    const int64_t first = int64_t(b) * BLOCK;
    for (int r = 0; r < rows; ++r) {
      const float* row = y + ptrdiff_t(r) * width;
      if (draws.dense && draws.dense[r] >= 0)
        std::memcpy(draws.dense_logits + draws.dense[r] * outputs + first, row, size_t(width) * sizeof(float));
      else
        choices[r].raise(row, width, first, parts + ptrdiff_t(thread) * rows + r);
    }
  });
  for (int i = 0; i < most_parts * rows; ++i) insert_top(best + i % rows, 1, parts[i]);
}

}  // namespace
