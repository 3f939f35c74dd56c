// Finds the largest output of a wide product without reading most of its weight. A copy of the weight with 8 bits gives
// an upper and a lower bound of every output, and only blocks whose upper bound reaches the largest lower bound are
// multiplied by the weight itself. The result equals that of the whole product, because the bounds are proven by the
// Cauchy-Schwarz inequality:
//   |w.x - c.y| <= |w - c| |x| + |c| |x - y| + rounding
// for weights w, their copy c, inputs x as rounded for the product, and inputs y as rounded for the copy.
#pragma once

#include "top_k.hpp"

namespace {
struct Screen {
  const void* copy;     // of the weight, packed as Int8PerOutput
  const float* errors;  // [outputs]: |w - c|
  const float* norms;   // the larger of |w| and |c|
};
}  // namespace

#if defined(AURORA_INT8_TILES)

namespace {

// A row's bound of the error of an output is `errors` times the output's Screen::errors plus `norms` times its norms.
struct ErrorFactors {
  float errors, norms;
};

inline ErrorFactors error_factors(const float* x, int inputs, float scale) {
  double squares = 0.0;
  for (int i = 0; i < inputs; ++i) squares += double(x[i]) * x[i];
  const float size = float(std::sqrt(squares)) * 1.0001f;
  // Inputs: half a step each. Sums in fp32: one last bit for each summand in both products, times a margin of four.
  const float rounding = 0.5001f * scale * std::sqrt(float(inputs)) + size * float(inputs + 16) * 0x1p-21f;
  return ErrorFactors{size * 1.0001f, rounding};
}

// Upper bound of a block's largest output; `lower` is raised to its lower bound.
inline void bounds(const float* y, const float* errors, const float* norms, int width, const ErrorFactors& factors,
                   float* upper, float* lower) {
  float high = -INFINITY, low = -INFINITY;
  if (width == BLOCK) {
    f16v highs = f16v{} - INFINITY, lows = highs;
    for (int v = 0; v < BLOCK; v += 16) {
      const f16v at = load16(y + v), off = load16(errors + v) * factors.errors + load16(norms + v) * factors.norms;
      highs = at + off > highs ? at + off : highs;
      lows = at - off > lows ? at - off : lows;
    }
    high = largest(highs), low = largest(lows);
  }
  for (int i = 0; width < BLOCK && i < width; ++i) {
    const float off = errors[i] * factors.errors + norms[i] * factors.norms;
    high = y[i] + off > high ? y[i] + off : high;
    low = y[i] - off > low ? y[i] - off : low;
  }
  *upper = high;
  *lower = low > *lower ? low : *lower;
}

// Index of each row's largest output, the first of equal ones; returns how many blocks were multiplied exactly.
template <class Format>
int screened_argmax(const float* x, ptrdiff_t x_stride, int rows, const void* w, const Screen& screen, int inputs,
                    int outputs, int64_t* indices) {
  typedef Product<Format> P;
  typedef Product<Int8PerOutput> Copy;
  const int k = P::padded(inputs), coarse_k = Copy::padded(inputs), blocks = num_blocks(outputs);
  const int most_parts = omp_get_max_threads();
  static thread_local Buffer<typename Format::Input> rounded;
  static thread_local Buffer<Int8Inputs> coarse;
  static thread_local Buffer<float> rounded_values, all_uppers, all_lowers;
  static thread_local Buffer<ErrorFactors> all_factors;
  static thread_local Buffer<Top> tops;
  static thread_local std::vector<int> chosen;
  typename Format::Input* to = rounded.at_least(P::buffer_rows(rows) * k);
  Int8Inputs* copy_x = coarse.at_least(Copy::buffer_rows(rows) * coarse_k);
  float* values = rounded_values.at_least(size_t(inputs));
  ErrorFactors* factors = all_factors.at_least(size_t(rows));
  for (int r = 0; r < rows; ++r) {
    P::round_row(x + r * x_stride, inputs, to, r, rows);
    P::rounded_row(x + r * x_stride, inputs, values);
    Copy::round_row(values, inputs, copy_x, r, rows);
    factors[r] = error_factors(values, inputs, copy_x[ptrdiff_t(r) * coarse_k].scale);
  }
  float* uppers = all_uppers.at_least(size_t(blocks) * rows);
  float* lowers = all_lowers.at_least(size_t(most_parts) * rows);
  for (int i = 0; i < most_parts * rows; ++i) lowers[i] = -INFINITY;
  each_block<Int8PerOutput>(copy_x, coarse_k, rows, screen.copy, outputs, nullptr, blocks,
                    [=, &screen](int thread, int b, const float* y, int width) {
                      for (int r = 0; r < rows; ++r)
                        bounds(y + ptrdiff_t(r) * width, screen.errors + b * BLOCK, screen.norms + b * BLOCK, width,
                               factors[r], uppers + ptrdiff_t(b) * rows + r, lowers + ptrdiff_t(thread) * rows + r);
                    });
  for (int part = 1; part < most_parts; ++part)
    for (int r = 0; r < rows; ++r)
      if (lowers[part * rows + r] > lowers[r]) lowers[r] = lowers[part * rows + r];
  chosen.clear();
  for (int b = 0; b < blocks; ++b)
    for (int r = 0; r < rows; ++r)
      if (!(uppers[ptrdiff_t(b) * rows + r] < lowers[r])) {  // also true if a bound is NaN
        chosen.push_back(b);
        break;
      }
  Top* top = tops.at_least(size_t(rows));
  top_of_blocks<Format>(to, k, rows, w, outputs, chosen.data(), int(chosen.size()), 1, top, nullptr);
  for (int r = 0; r < rows; ++r) indices[r] = top[r].index;
  return int(chosen.size());
}

}  // namespace
#endif
