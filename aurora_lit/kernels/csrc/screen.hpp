// The largest output of a wide product without reading most of its weights: a copy of them in eight bits bounds every
// output on both sides, and only blocks whose upper bound reaches the best lower bound are multiplied with the weights
// themselves. What is found is what the whole product would give: the bounds are proven, by Cauchy and Schwarz,
//   |w.x - c.y| <= |w - c| |x| + |c| |x - y| + rounding,
// for weights w, their copy c, inputs x as the product takes them, y as the copy does.
#pragma once

#include "tops.hpp"

#if defined(AURORA_BYTE_TILES)

namespace {

struct Screen {
  const void* copy;     // packed as Bytes
  const float* errors;  // [outputs]: |w - c|
  const float* norms;   // the larger of |w| and |c|
};

// How far a row's outputs may be off, as factors of an output's `errors` and `norms`.
struct Slack {
  float errors, norms;
};

inline Slack slack_of(const float* x, int inputs, float scale) {
  double squares = 0.0;
  for (int i = 0; i < inputs; ++i) squares += double(x[i]) * x[i];
  const float size = float(std::sqrt(squares)) * 1.0001f;
  // Of inputs: half a step each. Of sums in fp32: a last bit for each summand, in both products, four times over.
  const float rounding = 0.5001f * scale * std::sqrt(float(inputs)) + size * float(inputs + 16) * 0x1p-21f;
  return Slack{size * 1.0001f, rounding};
}

// Bounds of a block's largest output.
inline void bounds(const float* y, const float* errors, const float* norms, int width, const Slack& slack, float* upper,
                   float* lower) {
  float high = -INFINITY, low = -INFINITY;
  if (width == BLOCK) {
    f16v highs = f16v{} - INFINITY, lows = highs;
    for (int v = 0; v < BLOCK; v += 16) {
      const f16v at = load16(y + v), off = load16(errors + v) * slack.errors + load16(norms + v) * slack.norms;
      highs = at + off > highs ? at + off : highs;
      lows = at - off > lows ? at - off : lows;
    }
    high = largest(highs), low = largest(lows);
  }
  for (int i = 0; width < BLOCK && i < width; ++i) {
    const float off = errors[i] * slack.errors + norms[i] * slack.norms;
    high = y[i] + off > high ? y[i] + off : high;
    low = y[i] - off > low ? y[i] - off : low;
  }
  *upper = high;
  *lower = low > *lower ? low : *lower;
}

// Of each row the place of the largest output, of equal ones the first; returns how many blocks were multiplied.
template <class Kind>
int screened_argmax(const float* x, ptrdiff_t x_stride, int rows, const void* w, const Screen& screen, int inputs,
                    int outputs, int64_t* places) {
  typedef Product<Kind> P;
  typedef Product<Bytes> Copy;
  const int k = P::padded(inputs), coarse_k = Copy::padded(inputs), blocks = num_blocks(outputs);
  const int most_parts = omp_get_max_threads();
  static thread_local Buffer<typename Kind::Input> rounded;
  static thread_local Buffer<ByteInputs> coarse;
  static thread_local Buffer<float> seen_row, all_uppers, all_lowers;
  static thread_local Buffer<Slack> slacks;
  static thread_local Buffer<Top> tops;
  static thread_local std::vector<int> chosen;
  typename Kind::Input* to = rounded.at_least(P::buffer_rows(rows) * k);
  ByteInputs* copy_x = coarse.at_least(Copy::buffer_rows(rows) * coarse_k);
  float* seen = seen_row.at_least(size_t(inputs));
  Slack* slack = slacks.at_least(size_t(rows));
  for (int r = 0; r < rows; ++r) {
    P::round_row(x + r * x_stride, inputs, to, r);
    P::seen(to, inputs, r, seen);
    Copy::round_row(seen, inputs, copy_x, r);
    slack[r] = slack_of(seen, inputs, copy_x[ptrdiff_t(r) * coarse_k].scale);
  }
  float* uppers = all_uppers.at_least(size_t(blocks) * rows);
  float* lowers = all_lowers.at_least(size_t(most_parts) * rows);
  for (int i = 0; i < most_parts * rows; ++i) lowers[i] = -INFINITY;
  each_block<Bytes>(copy_x, coarse_k, rows, screen.copy, outputs, nullptr, blocks,
                    [=, &screen](int thread, int b, const float* y, int width) {
                      for (int r = 0; r < rows; ++r)
                        bounds(y + ptrdiff_t(r) * width, screen.errors + b * BLOCK, screen.norms + b * BLOCK, width,
                               slack[r], uppers + ptrdiff_t(b) * rows + r, lowers + ptrdiff_t(thread) * rows + r);
                    });
  for (int part = 1; part < most_parts; ++part)
    for (int r = 0; r < rows; ++r)
      if (lowers[part * rows + r] > lowers[r]) lowers[r] = lowers[part * rows + r];
  chosen.clear();
  for (int b = 0; b < blocks; ++b)
    for (int r = 0; r < rows; ++r)
      if (!(uppers[ptrdiff_t(b) * rows + r] < lowers[r])) {  // no number says no
        chosen.push_back(b);
        break;
      }
  Top* top = tops.at_least(size_t(rows));
  top_of_blocks<Kind>(to, k, rows, w, outputs, chosen.data(), int(chosen.size()), 1, top, nullptr);
  for (int r = 0; r < rows; ++r) places[r] = top[r].place;
  return int(chosen.size());
}

}  // namespace
#endif
