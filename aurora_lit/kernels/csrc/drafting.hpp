// Drafting: draft_start runs the draft over the positions that the target has committed since the last round, and each
// draft_step runs it over the nodes of the current level and chooses their most probable children. A chain is a tree
// with one node per level. The caller may stop between steps. The trees are those of modules/sampling/tree.py; source:
// EAGLE-2, arXiv 2406.16858.
//
// Shapes: B sequences, H hidden size, V vocabulary.
#pragma once

#include <algorithm>

#include "decoder.hpp"
#include "rows.hpp"

namespace {

struct DraftCall {
  DecoderCall decoder;  // the draft's layer and KV cache; `slots` and `starts` of the sequences
  Matrix fuse, head, value;
  const void* features;  // [slots, positions, 3H], of the cache's type: the target's auxiliary hidden states
  int64_t features_slot;
  const int64_t* committed;  // [slots, positions]: committed tokens
  int64_t committed_slot;
  RowTable embedding;          // [V, H]: the target's
  const int64_t* target_ids;   // the target's token id of each draft id
  const int64_t *done, *ends;  // [B]: first position to run; end of the positions to run
  int64_t children;            // considered for each node
  int64_t level_width;         // largest number of nodes of a level that are expanded
  float* reach;                // [B] out: probability that the accepted path passes a node to be expanded; or null
  float* values;               // [B] out, for chains: the value head at the last position; or null
};

// The tree of one sequence. Nodes are numbered in the order of their creation; -1 is the root.
struct GrowingTree {
  std::vector<int64_t> tokens, parents;
  std::vector<int64_t> level, before;  // nodes to be expanded next; nodes expanded last
  std::vector<double> logprobs;        // log-probability of the path from the root
  std::vector<int64_t> column;         // column of expanded nodes in the cache, -1 for others

  void begin() {
    tokens.clear(), parents.clear(), logprobs.clear(), column.clear();
    level.assign(1, -1), before.clear();
  }
  void add(int64_t parent, int64_t token, double logprob) {
    tokens.push_back(token), parents.push_back(parent), column.push_back(-1);
    logprobs.push_back((parent < 0 ? 0.0 : logprobs[size_t(parent)]) + std::min(0.0, logprob));
  }
  // The `count` most probable of the nodes from `start` on, sorted; of equal ones the earlier.
  std::vector<int64_t> best(size_t count, size_t start) const {
    std::vector<int64_t> found;
    for (size_t i = start; i < tokens.size(); ++i) found.push_back(int64_t(i));
    std::stable_sort(found.begin(), found.end(),
                     [&](int64_t a, int64_t b) { return logprobs[size_t(a)] > logprobs[size_t(b)]; });
    found.resize(std::min(count, found.size()));
    return found;
  }
};

// State between the steps of one proposal.
struct DraftState {
  std::vector<GrowingTree> rows;
  std::vector<int64_t> columns;  // [rows, columns]: parents' columns of the nodes in the cache
  int64_t num_columns = 0;
  std::vector<int64_t> begins;  // [rows + 1]: index of each row's first position in draft_start's pass
  Buffer<float> hidden, normed, next, embeds;  // of the nodes expanded last; `next`, `embeds`: inputs of the next ones
  Buffer<Top> tops;
  Buffer<LogSumExp> sums;
};

// Add children of the nodes whose hidden states are in `normed`, and choose the nodes to expand next.
template <class Format>
void choose_level(const DraftCall& call, DraftState& d) {
  const int H = int(call.decoder.hidden), children = int(call.children);
  const size_t width = d.rows[0].level.size();
  const int rows = int(d.rows.size() * width);
  Top* tops = d.tops.at_least(size_t(rows * children));
  LogSumExp* sums = d.sums.at_least(size_t(rows));
  multiply_top<Format>(d.normed.data(), H, rows, call.head.weight, H, int(call.head.outputs), children, tops,
                       call.reach ? sums : nullptr);
  if (call.values) multiply<Format>(d.normed.data(), H, rows, call.value.weight, H, 1, call.values, call.value.bias);
  for (size_t b = 0; b < d.rows.size(); ++b) {
    GrowingTree& row = d.rows[b];
    const size_t grown = row.tokens.size();
    for (size_t i = 0; i < width; ++i) {
      const size_t at = b * width + i;
      for (int c = 0; c < children; ++c) {
        const Top& top = tops[at * size_t(children) + size_t(c)];
        row.add(row.level[i], call.target_ids[top.index], call.reach ? double(top.value - sums[at].value()) : 0.0);
      }
    }
    row.before.swap(row.level);
    row.level = row.best(size_t(call.level_width), grown);
    if (!call.reach) continue;
    double reach = 0.0;
    for (const int64_t node : row.level) reach += std::exp(row.logprobs[size_t(node)]);
    call.reach[b] = float(reach);
  }
}

// Run the draft over newly committed positions, then choose the first level. A row without new positions runs one
// anyway: the result is arbitrary and is computed again once there is one.
template <class Format, class Cache>
void draft_start(const DraftCall& call, DraftState& d) {
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
  multiply<Format>(x, ptrdiff_t(F), int(N), call.fuse.weight, int(F), int(H), pass.hidden_states, call.fuse.bias);
  decode<Format, Cache>(pass);
  d.rows.resize(B);
  d.columns.clear(), d.num_columns = 0;
  float* hidden = d.hidden.at_least(B * H);
  float* last = d.normed.at_least(B * H);
  for (size_t b = 0; b < B; ++b) {
    d.rows[b].begin();
    const size_t at = size_t(d.begins[b + 1]) - 1;
    std::memcpy(hidden + b * H, pass.hidden_states + at * H, H * sizeof(float));
    std::memcpy(last + b * H, pass.normed + at * H, H * sizeof(float));
  }
  choose_level<Format>(call, d);
}

// Expand the current level, then choose the next.
template <class Format, class Cache>
void draft_step(const DraftCall& call, DraftState& d) {
  const size_t B = d.rows.size(), H = size_t(call.decoder.hidden), width = d.rows[0].level.size();
  const size_t before = d.rows[0].before.size(), old_columns = size_t(d.num_columns);
  std::vector<int64_t> columns;
  float* next = d.next.at_least(B * width * H);
  float* embeds = d.embeds.at_least(B * width * H);
  for (size_t b = 0; b < B; ++b) {
    GrowingTree& row = d.rows[b];
    columns.insert(columns.end(), d.columns.begin() + ptrdiff_t(b * old_columns),
                   d.columns.begin() + ptrdiff_t((b + 1) * old_columns));
    for (size_t i = 0; i < width; ++i) {
      const size_t node = size_t(row.level[i]);
      const int64_t parent = row.parents[node];
      const size_t parent_index = size_t(std::find(row.before.begin(), row.before.end(), parent) - row.before.begin());
      row.column[node] = int64_t(old_columns + i);
      columns.push_back(parent < 0 ? -1 : row.column[size_t(parent)]);
      std::memcpy(next + (b * width + i) * H, d.hidden.data() + (b * before + parent_index) * H, H * sizeof(float));
      call.embedding.row(int64_t(H), row.tokens[node], embeds + (b * width + i) * H);
    }
  }
  d.columns.swap(columns);
  d.num_columns = int64_t(old_columns + width);
  DecoderCall pass = call.decoder;
  pass.attention.queries = int64_t(width);
  pass.tree = Tree{d.columns.data(), d.num_columns};
  pass.embeds = embeds, pass.hidden_states = next, pass.normed = d.normed.at_least(B * width * H);
  decode<Format, Cache>(pass);
  d.hidden.swap(d.next);
  choose_level<Format>(call, d);
}

// The `count` most probable nodes of each row, or all if there are fewer: tokens and parents' columns [rows, nodes],
// where column 0 is the root; returns the number of nodes.
inline int64_t draft_finish(const DraftState& d, int64_t count, int64_t* tokens, int64_t* parents) {
  const size_t nodes = std::min(size_t(count), d.rows[0].tokens.size());
  std::vector<int64_t> column_of;
  for (size_t b = 0; b < d.rows.size(); ++b) {
    const GrowingTree& row = d.rows[b];
    // A parent is at least as probable as its child, so the best nodes include every parent.
    std::vector<int64_t> kept = row.best(nodes, 0);
    std::sort(kept.begin(), kept.end());
    column_of.assign(row.tokens.size(), 0);
    for (size_t i = 0; i < nodes; ++i) {
      const size_t node = size_t(kept[i]);
      column_of[node] = int64_t(i) + 1;
      tokens[b * nodes + i] = row.tokens[node];
      parents[b * nodes + i] = row.parents[node] < 0 ? 0 : column_of[size_t(row.parents[node])];
    }
  }
  return int64_t(nodes);
}

}  // namespace
