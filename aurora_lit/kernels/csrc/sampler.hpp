// Choosing a token from stored logits, for requests with logit bias, penalties, min-p, top-k or top-p: the options of
// modules/sampling/distribution.py, which documents their order, then the choice of choose.hpp among the tokens that are
// kept. One thread computes a row.
//
// Thresholds are found without sorting the vocabulary. Weights, the probabilities relative to the largest one, are
// counted and summed in bins of their leading bits; only the bin in which a threshold lies is sorted.
#pragma once

#include <algorithm>

#include "choose.hpp"

namespace {

// One row and its request's options.
struct DenseRow {
  const int64_t* bias_tokens;
  const float* bias_values;
  int64_t num_bias;
  const int64_t* context;  // prompt, then output
  int64_t context_length, prompt_length;
  int64_t top_k;  // 0: off
  int64_t key, position;
  float temperature;  // 0: the largest logit after bias and penalties
  float repetition, presence, frequency, min_p, top_p;

  bool is_penalised() const { return repetition != 1.0f || presence != 0.0f || frequency != 0.0f; }
  bool truncates() const { return temperature > 0.0f && (min_p > 0.0f || top_k > 0 || top_p < 1.0f); }
};

// True if every token that the row names is one of `vocab`.
inline bool names_tokens(const DenseRow& row, int64_t vocab) {
  for (int64_t i = 0; i < row.num_bias; ++i)
    if (row.bias_tokens[i] < 0 || row.bias_tokens[i] >= vocab) return false;
  for (int64_t i = 0; row.is_penalised() && i < row.context_length; ++i)
    if (row.context[i] < 0 || row.context[i] >= vocab) return false;
  return true;
}

// `counts`: of every token of the vocabulary, all zero before and after.
inline void apply_penalties(const DenseRow& row, float* logits, int32_t* counts) {
  constexpr int32_t OCCURS = 1 << 30;  // in prompt or output; below it the count in the output
  for (int64_t i = 0; i < row.context_length; ++i) {
    int32_t& count = counts[row.context[i]];
    count = (count + (i >= row.prompt_length)) | OCCURS;
  }
  for (int64_t i = 0; i < row.context_length; ++i) {
    const int64_t token = row.context[i];
    if (!counts[token]) continue;  // done: it occurs again
    const float in_output = float(counts[token] - OCCURS);
    float z = logits[token];
    z = z < 0.0f ? z * row.repetition : z / row.repetition;
    z -= row.frequency * in_output;
    if (in_output > 0.0f) z -= row.presence;
    logits[token] = z;
    counts[token] = 0;
  }
}

// Weights in [0, 1] by their leading bits: sixteen bins for each power of two.
class WeightBins {
 public:
  static constexpr int SHIFT = 19, COUNT = (0x3f800000 >> SHIFT) + 1;
  static int of(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return int(bits >> SHIFT);
  }
  void fill(const float* weights, int64_t size) {
    std::fill(counts_, counts_ + COUNT, 0);
    std::fill(sums_, sums_ + COUNT, 0.0);
    for (int64_t i = 0; i < size; ++i) {
      const int bin = of(weights[i]);
      ++counts_[bin];
      sums_[bin] += weights[i];
    }
  }
  // The k-th largest weight; or the smallest, or 0, if there are fewer.
  float kth_largest(int64_t k, const float* weights, int64_t size) {
    int bin = COUNT - 1;
    for (; bin > 0 && counts_[bin] < k; --bin) k -= counts_[bin];
    sort(bin, 0.0f, weights, size);
    return sorted_.empty() ? 0.0f : sorted_[std::min(size_t(k), sorted_.size()) - 1];
  }
  // The smallest weight that top-p keeps of those from `least` on: sorted, those before which less than `top_p` of their
  // sum lies, and at least the first.
  float top_p_threshold(float top_p, float least, const float* weights, int64_t size) {
    const int last = of(least);
    double in_last = sums_[last], sum = 0.0, before = 0.0;
    if (least > 0.0f) {
      sort(last, least, weights, size);
      in_last = 0.0;
      for (const float weight : sorted_) in_last += weight;
    }
    for (int bin = last + 1; bin < COUNT; ++bin) sum += sums_[bin];
    const double bound = double(top_p) * (sum + in_last);
    for (int bin = COUNT - 1; bin > last; before += sums_[bin--])
      if (counts_[bin] && before + sums_[bin] >= bound) return threshold_in(bin, before, bound, least, weights, size);
    return threshold_in(last, before, bound, least, weights, size);
  }

 private:
  // The last weight of a bin before which less than `bound` lies, or the first; `before` lies before the bin.
  float threshold_in(int bin, double before, double bound, float least, const float* weights, int64_t size) {
    sort(bin, least, weights, size);
    float threshold = sorted_.empty() ? least : sorted_[0];
    for (size_t i = 0; i < sorted_.size() && before < bound; ++i) {
      threshold = sorted_[i];
      before += sorted_[i];
    }
    return threshold;
  }
  // Collect the weights of a bin that are at least `least`, largest first.
  void sort(int bin, float least, const float* weights, int64_t size) {
    sorted_.clear();
    for (int64_t i = 0; i < size; ++i)
      if (of(weights[i]) == bin && weights[i] >= least) sorted_.push_back(weights[i]);
    std::sort(sorted_.begin(), sorted_.end(), [](float a, float b) { return a > b; });
  }

  int64_t counts_[COUNT];
  double sums_[COUNT];
  std::vector<float> sorted_;
};

// The weights of 16 logits; 0 where one is NaN.
inline f16v weights_of(f16v logits, float most, float inverse) {
  const f16v e = exp_vector((logits - most) * inverse), none = f16v{};
  return e > none ? e : none;
}

// The smallest weight that min-p, top-k and top-p keep; fills `weights`.
inline float smallest_kept(const DenseRow& row, const float* logits, int64_t vocab, float* weights) {
  const float inverse = 1.0f / row.temperature, most = *std::max_element(logits, logits + vocab);
  for (int64_t i = 0; i < vocab; i += 16) {
    const size_t bytes = size_t(std::min<int64_t>(16, vocab - i)) * sizeof(float);
    f16v of_16 = f16v{} - INFINITY;
    std::memcpy(&of_16, logits + i, bytes);
    of_16 = weights_of(of_16, most, inverse);
    std::memcpy(weights + i, &of_16, bytes);
  }
  static thread_local WeightBins bins;
  float least = row.min_p;
  if (row.top_k > 0 || row.top_p < 1.0f) bins.fill(weights, vocab);
  if (row.top_k > 0) least = std::max(least, bins.kth_largest(row.top_k, weights, vocab));
  if (row.top_p < 1.0f) least = std::max(least, bins.top_p_threshold(row.top_p, least, weights, vocab));
  return least;
}

// The row's token; bias and penalties are applied to the logits in place.
inline int64_t choose_of_row(const DenseRow& row, float* logits, int64_t vocab) {
  static thread_local std::vector<int32_t> counts;
  static thread_local Buffer<float> all_weights;
  for (int64_t i = 0; i < row.num_bias; ++i) logits[row.bias_tokens[i]] += row.bias_values[i];
  if (row.is_penalised()) {
    if (int64_t(counts.size()) < vocab) counts.resize(size_t(vocab), 0);
    apply_penalties(row, logits, counts.data());
  }
  if (!(row.temperature > 0.0f)) return std::max_element(logits, logits + vocab) - logits;
  const bool truncates = row.truncates();
  const float* weights = nullptr;
  float least = 0.0f;
  if (truncates) {
    float* to = all_weights.at_least(size_t(vocab));
    least = smallest_kept(row, logits, vocab, to);
    weights = to;
  }
  const float inverse = 1.0f / row.temperature;
  const NoiseKey key = noise_key(row.key, row.position);
  Top best{-INFINITY, 0};
  for (int64_t first = 0; first < vocab; first += BLOCK) {
    const int width = vocab - first < BLOCK ? int(vocab - first) : BLOCK;
    float kept[BLOCK];
    bool any = !truncates;
    for (int i = 0; truncates && i < width; ++i) any |= weights[first + i] >= least;
    if (!any) continue;
    for (int i = 0; i < width; ++i)
      kept[i] = !truncates || weights[first + i] >= least ? logits[first + i] : -INFINITY;
    choose_of_block(kept, width, inverse, key, first, &best);
  }
  return best.index;
}

// A token for each of `count` rows of logits [count, vocab]; 0, and nothing is chosen, if a row names a token that is not
// in the vocabulary.
inline int choose_dense(float* logits, int64_t vocab, const DenseRow* rows, int64_t count, int64_t* tokens) {
  for (int64_t r = 0; r < count; ++r)
    if (!names_tokens(rows[r], vocab)) return 0;
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
  for (int64_t r = 0; r < count; ++r) tokens[r] = choose_of_row(rows[r], logits + r * vocab, vocab);
  return 1;
}

}  // namespace
