// Choosing a token for each row of a product while reading little more than half of its weight. The high halves of the
// codes (split.hpp) give an upper and a lower bound of every output, and so of what the rows choose by: a larger output
// stays larger, or equal, when it is scaled, perturbed and rounded. First the blocks that seem best are multiplied whole,
// then all others whose upper bound reaches what these have. So the chosen tokens are those of the whole product.
#pragma once

#include <algorithm>

#include "choose.hpp"
#include "split.hpp"

namespace {

// At most so many rows are screened. More would be no faster: at least one of them needs most blocks, or tiles multiply
// them, which take as long for approximate products.
constexpr int SCREENED_ROWS = Grouped<8>::MAX_ROWS;
#if defined(AURORA_GROUPED_TILES)
static_assert(SCREENED_ROWS < GROUPED_TILES_MIN_ROWS, "tiles have no approximate product");
#endif

// |x| of a row as it is rounded, for the bounds of split.hpp. Infinite where sums might overflow: weights are less than
// 2^23 in size, so |w| |x| is less than 2^33 |x| for up to 2^20 inputs. NaN if an input is not finite.
inline float size_of_inputs(const float* x, int inputs) {
  static thread_local Buffer<float> buffer;
  float* rounded = buffer.at_least(size_t(inputs));
  GroupedInputs::rounded_row(x, inputs, rounded);
  double squares = 0.0;
  for (int i = 0; i < inputs; ++i) squares += double(rounded[i]) * rounded[i];
  const double size = std::sqrt(squares) * 1.0001;
  return size > 0x1p90 ? INFINITY : float(size);
}

// The upper bound of what a block's outputs are chosen by, or less if none of them reaches `least`, a lower bound of the
// row's largest, which is raised. y: approximate outputs; `errors` times `size` are their errors.
inline float upper_bound(const Choice& choice, const float* y, const float* errors, float size, int width, int64_t first,
                         float* least) {
  constexpr float UNDERFLOW_ERROR = 1e-27f;  // of sums of up to 2^14 groups, each at most 2^-126 * 2^19
  float padded[BLOCK];
  if (width < BLOCK) {
    for (int i = 0; i < BLOCK; ++i) padded[i] = i < width ? y[i] : -INFINITY;
    y = padded;
  }
  f16v highs = f16v{} - INFINITY, lows = highs;
  for (int i = 0; i < BLOCK; i += 16) {
    const f16v at = load16(y + i), error = load16(errors + i) * size + UNDERFLOW_ERROR;
    f16v high = at + error, low = at - error;
    if (choice.inverse > 0.0f) {
      high = high * choice.inverse, low = low * choice.inverse;
      const f16v v = uniform_of(noise_bits(choice.key, tokens_from(uint32_t(first) + uint32_t(i))));
      if (!any_less(v, largest_uniform(high, *least))) continue;
      const f16v noise = gumbel_of(v);
      high += noise, low += noise;
    }
    high = high == high ? high : f16v{} + INFINITY;
    highs = high > highs ? high : highs;
    lows = low > lows ? low : lows;
  }
  const float low = largest(lows);
  *least = low > *least ? low : *least;
  return largest(highs);
}

// Upper bounds of all blocks for some rows.
class Bounds {
 public:
  // x: [rows, inputs]; `rounded`: the same for the product.
  Bounds(const float* x, ptrdiff_t x_stride, const InputGroup* rounded, int groups, int rows, const void* w, int inputs,
         int outputs, const Choice* choices)
      : rows_(rows), blocks_(num_blocks(outputs)) {
    static thread_local Buffer<float> all_uppers, all_leasts, all_sizes;
    const int most_parts = omp_get_max_threads();
    float* uppers = all_uppers.at_least(size_t(blocks_) * rows);
    float* leasts = all_leasts.at_least(size_t(most_parts) * rows);  // each thread has its own
    float* sizes = all_sizes.at_least(size_t(rows));
    for (int r = 0; r < rows; ++r) sizes[r] = size_of_inputs(x + r * x_stride, inputs);
    for (int i = 0; i < most_parts * rows; ++i) leasts[i] = -INFINITY;
    const auto bound = [=](int thread, int b, const float* y, int width) {
      const float* errors = SplitBlock(w, groups, b).errors;
      for (int r = 0; r < rows; ++r)
        uppers[ptrdiff_t(b) * rows + r] = upper_bound(choices[r], y + ptrdiff_t(r) * width, errors, sizes[r], width,
                                                      int64_t(b) * BLOCK, leasts + ptrdiff_t(thread) * rows + r);
    };
    each_block<SplitInt8<false>>(rounded, groups, rows, w, outputs, nullptr, blocks_, bound);
    for (int i = rows; i < most_parts * rows; ++i)
      if (leasts[i] > leasts[i % rows]) leasts[i % rows] = leasts[i];
    uppers_ = uppers, least_ = leasts;
  }

  // For each row the block with the largest bound.
  void likeliest(std::vector<int>* found) const {
    found->clear();
    for (int r = 0; r < rows_; ++r) {
      int most = 0;
      for (int b = 1; b < blocks_; ++b)
        if (upper(b, r) > upper(most, r)) most = b;
      if (std::find(found->begin(), found->end(), most) == found->end()) found->push_back(most);
    }
  }
  // The blocks that may hold a row's best token, if `best` is the best of some.
  void reaching(const Top* best, std::vector<int>* found) const {
    found->clear();
    for (int b = 0; b < blocks_; ++b)
      for (int r = 0; r < rows_; ++r)
        if (upper(b, r) >= least_[r] && upper(b, r) >= best[r].value) {
          found->push_back(b);
          break;
        }
  }

 private:
  float upper(int b, int r) const { return uppers_[ptrdiff_t(b) * rows_ + r]; }

  int rows_, blocks_;
  const float *uppers_, *least_;  // [blocks, rows] and [rows]
};

// Whether bounds are worth their reading: on some targets (SmolLM2) they hardly exclude a block. Tokens are the same
// either way.
class ScreenUse {
 public:
  explicit ScreenUse(const void* weight = nullptr) : weight_(weight) {}
  bool is_next(const void* weight) {
    if (weight != weight_) *this = ScreenUse(weight);
    if (whole_share_ < MOST_SHARE || ++skipped_ == RETRIED_AFTER) skipped_ = 0;
    return skipped_ == 0;
  }
  // `share`: of the blocks that were read whole.
  void add(float share) { whole_share_ += (share - whole_share_) / 8; }

 private:
  static constexpr float MOST_SHARE = 0.4f;  // half of the reading is that of the bounds
  static constexpr int RETRIED_AFTER = 64;   // calls
  const void* weight_;
  float whole_share_ = 0.0f;  // a running mean
  int skipped_ = 0;
};

// Choose a token for each row of x times a packed weight.
template <class Format>
void multiply_choose(const float* x, ptrdiff_t x_stride, int rows, const void* w, int inputs, int outputs,
                     const Draws& draws) {
  typedef Product<Format> P;
  const int k = P::padded(inputs), blocks = num_blocks(outputs);
  static thread_local Buffer<typename Format::Input> rounded;
  static thread_local Buffer<Choice> all_choices;
  static thread_local Buffer<Top> all_tops;
  typename Format::Input* to = rounded.at_least(P::buffer_rows(rows) * k);
  Choice* choices = all_choices.at_least(size_t(rows));
  Top* best = all_tops.at_least(size_t(rows));
  for (int r = 0; r < rows; ++r) {
    P::round_row(x + r * x_stride, inputs, to, r, rows);
    choices[r] = Choice::of(draws, r);
    best[r] = Top{-INFINITY, 0};
  }
  const auto raise = [&](const int* of, int count) {
    choose_of_blocks<Format>(to, k, rows, w, outputs, of, count, draws, choices, best);
  };
  bool is_screened = false;
  if constexpr (std::is_same<Format, SplitInt8<true>>::value) {
    static thread_local ScreenUse uses[SCREENED_ROWS];  // by number of rows
    is_screened = !draws.dense && 0 < rows && rows <= SCREENED_ROWS && uses[rows - 1].is_next(w);
    if (is_screened) {
      static thread_local std::vector<int> chosen;
      const Bounds bounds(x, x_stride, to, k, rows, w, inputs, outputs, choices);
      bounds.likeliest(&chosen);
      raise(chosen.data(), int(chosen.size()));
      bounds.reaching(best, &chosen);
      raise(chosen.data(), int(chosen.size()));
      uses[rows - 1].add(float(chosen.size()) / float(blocks));
    }
  }
  if (!is_screened) raise(nullptr, blocks);
  for (int r = 0; r < rows; ++r) draws.tokens[r] = best[r].index;
}

}  // namespace
