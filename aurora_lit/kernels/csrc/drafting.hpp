// Drafting: a chain of proposals for each sequence in one call. The first pass runs the draft over the positions that the
// target has committed since the last round, and each further pass over the last level's likeliest token. For a sequence
// with a temperature, logits are divided by it and get the noise that the target's own token will be drawn with
// (noise.hpp), which makes the proposals likelier to be that token; the likeliest are then those with the largest sums.
// Drafting ends after `max_levels` levels, or before a level that promises too little.
//
// A chain may be weighed: beside the likeliest token of each level stand the next likeliest, which cost no pass of the
// draft, and of all these only those are proposed that promise more accepted tokens than their columns of the target's
// pass cost. With siblings a proposal is a tree as in modules/sampling/tree.py.
//
// Shapes: B sequences, H hidden size, V vocabulary, D draft vocabulary.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "decoder.hpp"
#include "noise.hpp"
#include "rows.hpp"

namespace {

constexpr int SHARES = 16;  // classes of shares, equally wide

struct DraftCall {
  DecoderCall decoder;  // the draft's layer and KV cache; `slots` of the sequences
  Matrix fuse, head, value;
  Matrix coarse;         // a copy of the head in four bits (Grouped<4>); or without weight: there is none
  const void* features;  // [slots, positions, 3H], of the cache's type: the target's auxiliary hidden states
  int64_t features_slot;
  const int64_t* committed;  // [slots, positions]: committed tokens
  int64_t committed_slot;
  RowTable embedding;          // [V, H]: the target's
  const int64_t* target_ids;   // the target's token id of each draft id
  const int64_t *done, *ends;  // [B]: first position to run; end of the positions to run
  int64_t children;            // tokens of a level: the likeliest and its siblings; 1 if nothing is weighed
  int64_t max_levels, max_nodes;
  const float* temperatures;  // [B]: 0 is without noise; or null: 0 for all
  const int64_t* keys;        // [B], if there are temperatures: of the noise
  const int64_t* positions;   // [B], if there are temperatures: index in the output of the first proposed token
  // Of chains that are weighed, else null. [2, SHARES], of greedy and of perturbed rows: how often a node's likeliest child
  // is accepted if the node is, by the share that the draft gives it; other children as often as their shares say.
  const float* acceptance;
  const double* level_rates;  // [B]: what a further level is expected to be accepted with
  double speed;               // tokens per second that time is worth
  const double* columns_s;  // [num_columns]: seconds that 0, 1, 2, … proposals of all rows together take in the target's pass
  int64_t num_columns;
  const double* levels_s;  // [max_levels - 1]: seconds that each level after the first takes
  float* outcomes;  // [max_levels, B] out: the value head's prediction of tokens accepted from this level on; of weighed
                    // chains the probability that all likeliest tokens until this level are accepted
  float* shares;    // [max_levels, B] out, of weighed chains: share of a level's likeliest token
  int64_t* first;   // [max_levels, B] out, of weighed chains: its target id, whether it is proposed or not
  int64_t* counts;  // [B] out: proposals
  int64_t *tokens, *parents;  // [B, max_nodes] out: target ids, and parents' columns, where column 0 is the root
  int64_t levels;             // out

  bool is_weighed() const { return acceptance != nullptr; }
};

// The chain of one sequence and what stands beside it: `children` nodes a level, the likeliest first, all of which follow
// the first node of the level before.
struct Chain {
  std::vector<int64_t> tokens;
  std::vector<double> logprobs;  // log-probability that everything until the node is accepted

  // The `count` most probable nodes, sorted; of equal ones the earlier.
  std::vector<size_t> best(size_t count) const {
    std::vector<size_t> found(tokens.size());
    std::iota(found.begin(), found.end(), size_t(0));
    std::stable_sort(found.begin(), found.end(), [&](size_t a, size_t b) { return logprobs[a] > logprobs[b]; });
    found.resize(std::min(count, found.size()));
    return found;
  }
};

// State between the levels of one proposal, and buffers.
struct DraftState {
  std::vector<Chain> rows;
  std::vector<int64_t> begins;  // [rows + 1]: index of each row's first position in the first pass
  std::vector<int64_t> starts;  // [rows]: position of a further pass
  Buffer<float> hidden, normed, embeds;  // [rows, H] of the last level; `embeds`: of the next pass, too
  Buffer<Top> tops;
  Buffer<LogSumExp> sums;
  Buffer<float> noise;  // [rows, D], of a level
  Buffer<Perturbation> perturbations;
};

inline bool is_perturbed(const DraftCall& call, int64_t b) { return call.temperatures && call.temperatures[b] > 0.0f; }

// How a level changes the logits of each sequence; null if no sequence has a temperature.
inline const Perturbation* perturbations_of(const DraftCall& call, DraftState& d, int64_t level) {
  const int64_t B = int64_t(d.rows.size()), D = call.head.outputs;
  bool any = false;
  for (int64_t b = 0; b < B; ++b) any |= is_perturbed(call, b);
  if (!any) return nullptr;
  float* noise = d.noise.at_least(size_t(B * D));
  Perturbation* found = d.perturbations.at_least(size_t(B));
  for (int64_t b = 0; b < B; ++b)
    found[b] =
        is_perturbed(call, b) ? Perturbation{1.0f / call.temperatures[b], noise + b * D} : Perturbation{1.0f, nullptr};
#pragma omp parallel for schedule(static)
  for (int64_t first = 0; first < D; first += 16) {
    const int lanes = int(std::min<int64_t>(16, D - first));
    u16v tokens = u16v{};
    for (int i = 0; i < lanes; ++i) tokens[i] = uint32_t(call.target_ids[first + i]);
    for (int64_t b = 0; b < B; ++b) {
      if (!is_perturbed(call, b)) continue;
      const f16v of_16 = gumbel(noise_key(call.keys[b], call.positions[b] + level), tokens);
      std::memcpy(noise + b * D + first, &of_16, size_t(lanes) * sizeof(float));
    }
  }
  return found;
}

// A chain of few sequences reads the head's copy in four bits, and then only the blocks of the head that hold the most
// probable CANDIDATES of each row by the copy. On real hidden states these blocks hold the head's own
// choice in 98.6 of 100 cases.
constexpr int CANDIDATES = 4;
constexpr int MAX_COARSE_ROWS = 3;  // with more rows the copy takes longer than the head

template <class Format>
void coarse_top(const DraftCall& call, const float* normed, const typename Format::Input* x, int k, int rows,
                const Perturbation* perturbations, Top* tops, LogSumExp* sums) {
  typedef Product<Grouped<4>> Copy;
  const int H = int(call.decoder.hidden), outputs = int(call.head.outputs), copy_k = Copy::padded(H);
  const int children = int(call.children);
  static thread_local Buffer<InputGroup> rounded;
  InputGroup* copy_x = rounded.at_least(Copy::buffer_rows(rows) * size_t(copy_k));
  for (int r = 0; r < rows; ++r) Copy::round_row(normed + ptrdiff_t(r) * H, H, copy_x, r, rows);
  Top candidates[MAX_COARSE_ROWS * CANDIDATES];
  top_of_blocks<Grouped<4>>(copy_x, copy_k, rows, call.coarse.weight, outputs, nullptr, num_blocks(outputs), CANDIDATES,
                            candidates, sums, perturbations);
  int blocks[MAX_COARSE_ROWS * CANDIDATES];
  for (int i = 0; i < rows * CANDIDATES; ++i) blocks[i] = int(candidates[i].index) / BLOCK;
  std::sort(blocks, blocks + rows * CANDIDATES);
  const int count = int(std::unique(blocks, blocks + rows * CANDIDATES) - blocks);
  with_format<Format>(call.head, [&](auto format) {
    top_of_blocks<decltype(format)>(x, k, rows, call.head.weight, outputs, blocks, count, children, tops, nullptr,
                                    perturbations);
  });
}

// Add the level that follows the states in `normed`.
template <class Format>
void choose_level(const DraftCall& call, DraftState& d, int64_t level) {
  typedef Product<Format> P;
  const int H = int(call.decoder.hidden), children = int(call.children), k = P::padded(H);
  const int rows = int(d.rows.size());
  static thread_local Buffer<typename Format::Input> rounded;
  typename Format::Input* x = rounded.at_least(P::buffer_rows(rows) * size_t(k));
  for (int r = 0; r < rows; ++r) P::round_row(d.normed.data() + ptrdiff_t(r) * H, H, x, r, rows);
  Top* tops = d.tops.at_least(size_t(rows * children));
  LogSumExp* sums = d.sums.at_least(size_t(rows));
  float* outcomes = call.outcomes + level * int64_t(d.rows.size());
  const Perturbation* perturbations = perturbations_of(call, d, level);
  if (call.coarse.weight && children <= CANDIDATES && rows <= MAX_COARSE_ROWS)
    coarse_top<Format>(call, d.normed.data(), x, k, rows, perturbations, tops, call.is_weighed() ? sums : nullptr);
  else
    with_format<Format>(call.head, [&](auto format) {
      top_of_blocks<decltype(format)>(x, k, rows, call.head.weight, int(call.head.outputs), nullptr,
                                      num_blocks(int(call.head.outputs)), children, tops,
                                      call.is_weighed() ? sums : nullptr, perturbations);
    });
  if (!call.is_weighed())
    with_format<Format>(call.value, [&](auto format) {
      typedef Product<decltype(format)> Own;
      const char* end = static_cast<const char*>(call.value.weight) + Own::block_bytes(k);
      Own::enter(rows);
      Own::blocks(x, k, rows, call.value.weight, 1, Stream{end, end}, outcomes, call.value.bias, false, 0, 1);
      Own::leave();
    });
  for (size_t b = 0; b < d.rows.size(); ++b) {
    Chain& row = d.rows[b];
    const Top* of_row = tops + b * size_t(children);
    for (int c = 0; c < children; ++c) row.tokens.push_back(call.target_ids[of_row[c].index]);
    if (!call.is_weighed()) continue;
    const auto logprob = [&](int c) { return std::min(0.0, double(of_row[c].value - sums[b].value())); };
    const float share = float(std::exp(logprob(0)));
    call.shares[level * rows + int64_t(b)] = share;
    call.first[level * rows + int64_t(b)] = call.target_ids[of_row[0].index];
    const int class_ = std::min(SHARES - 1, int(share * SHARES));
    // Log-probability that the likeliest token is accepted, and that everything before it is.
    const double most = std::log(double(call.acceptance[(is_perturbed(call, int64_t(b)) ? SHARES : 0) + class_]));
    const double reached = level ? row.logprobs[size_t((level - 1) * children)] : 0.0;
    for (int c = 0; c < children; ++c) row.logprobs.push_back(reached + (c ? std::min(most, logprob(c)) : most));
    outcomes[b] = float(std::exp(reached + most));
  }
}

// True if another level of a weighed chain after `levels` levels repays the draft's pass, with what it promises beyond a
// usual column. Other chains are drafted whole.
inline bool promises_more(const DraftCall& call, const DraftState& d, int64_t levels) {
  if (!call.is_weighed()) return true;
  const int64_t usual = std::min(int64_t(2 * d.rows.size()), call.num_columns - 1);
  const double column_price = call.speed * call.columns_s[usual] / double(usual);
  const float* outcomes = call.outcomes + (levels - 1) * int64_t(d.rows.size());
  double gain = 0.0;
  for (size_t b = 0; b < d.rows.size(); ++b) gain += std::max(0.0, outcomes[b] * call.level_rates[b] - column_price);
  return gain > call.speed * call.levels_s[levels - 1];
}

// Run the draft over newly committed positions, then choose the first level. A row without new positions runs one
// anyway: the result is arbitrary and is computed again once there is one.
template <class Format, class Cache>
void first_level(const DraftCall& call, DraftState& d) {
  const size_t B = size_t(call.decoder.attention.rows), H = size_t(call.decoder.hidden), F = size_t(call.fuse.inputs);
  int64_t most = 1;
  d.begins.assign(1, 0);
  for (size_t b = 0; b < B; ++b) {
    const int64_t count = std::max(int64_t(1), call.ends[b] - call.done[b]);
    most = std::max(most, count);
    d.begins.push_back(d.begins.back() + count);
  }
  const size_t N = size_t(d.begins.back());
  static thread_local Buffer<float> features, stream, normed;
  float* x = features.at_least(N * F);
  float* embeds = d.embeds.at_least(N * H);
  for (size_t b = 0; b < B; ++b)
    for (int64_t at = d.begins[b]; at < d.begins[b + 1]; ++at) {
      const int64_t slot = call.decoder.slots[b], position = call.done[b] + at - d.begins[b];
      const Cache* from = static_cast<const Cache*>(call.features) + slot * call.features_slot + position * int64_t(F);
      float* to = x + size_t(at) * F;
      size_t i = 0;
      for (; i + 16 <= F; i += 16) {
        const f16v v = load16(from + i);
        std::memcpy(to + i, &v, sizeof v);
      }
      for (; i < F; ++i) to[i] = load(from + i);
      const int64_t token = call.committed[slot * call.committed_slot + position + 1];
      call.embedding.row(int64_t(H), token, embeds + size_t(at) * H);
    }
  DecoderCall pass = call.decoder;
  pass.attention.queries = most, pass.attention.begins = d.begins.data(), pass.starts = call.done;
  pass.embeds = embeds, pass.hidden_states = stream.at_least(N * H), pass.normed = normed.at_least(N * H);
  with_format<Format>(call.fuse, [&](auto format) {
    multiply<decltype(format)>(x, ptrdiff_t(F), int(N), call.fuse.weight, int(F), int(H), pass.hidden_states,
                               call.fuse.bias);
  });
  decode<Format, Cache>(pass);
  d.rows.resize(B);
  float* hidden = d.hidden.at_least(B * H);
  float* last = d.normed.at_least(B * H);
  for (size_t b = 0; b < B; ++b) {
    d.rows[b].tokens.clear(), d.rows[b].logprobs.clear();
    const size_t at = size_t(d.begins[b + 1]) - 1;
    std::memcpy(hidden + b * H, pass.hidden_states + at * H, H * sizeof(float));
    std::memcpy(last + b * H, pass.normed + at * H, H * sizeof(float));
  }
  choose_level<Format>(call, d, 0);
}

// Run the draft over the likeliest token of the level before, then choose the next level.
template <class Format, class Cache>
void next_level(const DraftCall& call, DraftState& d, int64_t level) {
  const size_t B = d.rows.size(), H = size_t(call.decoder.hidden);
  d.starts.resize(B);
  for (size_t b = 0; b < B; ++b) {
    const int64_t token = d.rows[b].tokens[size_t((level - 1) * call.children)];
    call.embedding.row(int64_t(H), token, d.embeds.data() + b * H);
    d.starts[b] = call.ends[b] + level - 1;
  }
  DecoderCall pass = call.decoder;
  pass.attention.queries = 1, pass.starts = d.starts.data();
  pass.embeds = d.embeds.data(), pass.hidden_states = d.hidden.data(), pass.normed = d.normed.data();
  decode<Format, Cache>(pass);
  choose_level<Format>(call, d, level);
}

// Of the nodes of all rows, each row's most probable first, how many of each row promise most accepted tokens beyond
// their price.
inline std::vector<size_t> worthwhile(const DraftCall& call, const DraftState& d,
                                      const std::vector<std::vector<size_t>>& best) {
  std::vector<std::pair<double, size_t>> found;  // log-probability and row
  for (size_t b = 0; b < best.size(); ++b)
    for (const size_t node : best[b]) found.emplace_back(d.rows[b].logprobs[node], b);
  std::stable_sort(found.begin(), found.end(), [](const auto& x, const auto& y) { return x.first > y.first; });
  double promised = 0.0, most = 0.0;
  size_t count = 0;
  for (size_t n = 0; n < found.size() && int64_t(n) + 1 < call.num_columns; ++n) {
    promised += std::exp(found[n].first);
    const double gain = promised - call.speed * call.columns_s[n + 1];
    if (gain > most) most = gain, count = n + 1;
  }
  std::vector<size_t> counts(best.size());
  for (size_t n = 0; n < count; ++n) ++counts[found[n].second];
  return counts;
}

// Write what is worth it of each row of a weighed chain.
inline void write_worthwhile(DraftCall& call, const DraftState& d) {
  std::vector<std::vector<size_t>> best;
  for (const Chain& row : d.rows) best.push_back(row.best(size_t(call.max_nodes)));
  const std::vector<size_t> counts = worthwhile(call, d, best);
  const size_t children = size_t(call.children);
  for (size_t b = 0; b < d.rows.size(); ++b) {
    // The chain comes first: an accepted path that is its beginning lies in order already. What a node follows is at
    // least as probable, and before it, so it is proposed too, in the column of its level.
    std::vector<size_t>& kept = best[b];
    kept.resize(counts[b]);
    std::sort(kept.begin(), kept.end());
    std::stable_partition(kept.begin(), kept.end(), [&](size_t node) { return node % children == 0; });
    int64_t* tokens = call.tokens + int64_t(b) * call.max_nodes;
    int64_t* parents = call.parents + int64_t(b) * call.max_nodes;
    for (size_t i = 0; i < kept.size(); ++i)
      tokens[i] = d.rows[b].tokens[kept[i]], parents[i] = int64_t(kept[i] / children);
    call.counts[b] = int64_t(kept.size());
  }
}

// Write the whole chain of each row.
inline void write_chains(DraftCall& call, const DraftState& d) {
  for (size_t b = 0; b < d.rows.size(); ++b) {
    const std::vector<int64_t>& tokens = d.rows[b].tokens;
    std::copy(tokens.begin(), tokens.end(), call.tokens + int64_t(b) * call.max_nodes);
    call.counts[b] = int64_t(tokens.size());
  }
}

template <class Format, class Cache>
void draft(DraftCall& call, DraftState& d) {
  first_level<Format, Cache>(call, d);
  for (call.levels = 1; call.levels < call.max_levels && promises_more(call, d, call.levels); ++call.levels)
    next_level<Format, Cache>(call, d, call.levels);
  call.is_weighed() ? write_worthwhile(call, d) : write_chains(call, d);
}

}  // namespace
