// Copied proposals: what followed the last tokens of a sequence before, earlier in the same sequence, in a text that it
// repeats and in a memory of other sequences (suffix_memory.hpp), as a tree of the likeliest nodes.
// kernels/suffix_index.py documents the results.
//
// The sequence's own tokens are scanned, which takes about a nanosecond a token. What a sequence's own domain has
// remembered is preferred: other occurrences count only if more tokens agree.
//
// An answer that repeats a text with small differences, its prediction or something in its prompt, has a *place* there.
// After a difference one agreeing token near it says more than elsewhere: it is found again without waiting for more.
#pragma once

#include "suffix_memory.hpp"

namespace {

// Sizes that kernels/suffix_index.py knows too.
constexpr int NUM_KINDS = 4, NUM_LENGTHS = 8, NUM_SHARES = 5, NUM_COUNTS = 4;
constexpr int PLACE_KIND = 3;

constexpr int MAX_OWN = 16;                             // occurrences of each text
constexpr int64_t PLACE_BACK = 16, PLACE_AHEAD = 128;  // how far from its last place a sequence is looked for
constexpr int START_MATCH = 4;  // that a text and an answer both begin counts as so many agreeing tokens
constexpr int FIRM_MATCH = 2;   // agreeing tokens from which on a place near the last one counts as the new one,
constexpr int FAR_MATCH = 8;    // and from which on, or so many more than near it, one anywhere does

// A text that a sequence repeats with small differences: its prediction, or else its prompt.
struct Text {
  const int64_t* tokens;
  int64_t count;
  bool given;  // a prediction, which is no part of the sequence
};

// Positions in a sequence, or in the text that is given with it, that follow the same tokens as its end, latest first.
// Those after one equal token only go to `single`.
inline void find_own(const int64_t* tokens, int64_t length, const Text& text, std::vector<Occurrence>& found,
                     std::vector<Occurrence>& single) {
  if (length < 2) return;
  const int64_t last = tokens[length - 1], second = tokens[length - 2];
  int num_found = 0, num_single = 0;
  for (int64_t at = text.count - 1; at >= 1 && num_found < MAX_OWN; --at) {
    if (text.tokens[at - 1] != last) continue;
    if (at < 2 || text.tokens[at - 2] != second) {
      if (num_single++ < MAX_OWN) single.push_back({uint64_t(at), 1, true, true, text.given});
      continue;
    }
    const int64_t most = std::min<int64_t>(MAX_MATCH, std::min(at, length));
    int64_t n = 2;
    while (n < most && text.tokens[at - 1 - n] == tokens[length - 1 - n]) ++n;
    found.push_back({uint64_t(at), int32_t(n), true, true, text.given});
    ++num_found;
  }
}

// Where an answer is now in the text that it repeats: near its last place `last`, `since` tokens ago, where most tokens
// before the answer's end agree; of equal ones nearest to where it is expected, as if tokens had only been replaced.
// Length 0: nowhere near. `said`: tokens of the answer.
inline Occurrence find_place(const Text& text, const int64_t* end, int64_t said, int64_t last, int64_t since) {
  Occurrence best{0, 0, true, true, text.given, 0};
  const int64_t expected = last + since;
  int64_t nearest = 0;
  for (int64_t at = std::max<int64_t>(0, last - PLACE_BACK); at < std::min(text.count, last + PLACE_AHEAD); ++at) {
    const int64_t most = std::min<int64_t>(MAX_MATCH, std::min(at, said));
    int64_t n = 0;
    while (n < most && text.tokens[at - 1 - n] == end[-1 - n]) ++n;
    if (text.given && n == at && n == said) n = std::min<int64_t>(MAX_MATCH, n + START_MATCH);
    const int64_t gap = std::abs(at - expected);
    if (n < std::max(1, best.length) || (n == best.length && gap >= nearest)) continue;
    nearest = gap;
    best.next = uint64_t(at), best.length = int32_t(n);
    best.gap = gap == 0 ? 0 : gap <= 4 ? 1 : gap <= 16 ? 2 : 3;
  }
  return best;
}

// -- trees of copies ---------------------------------------------------------------------------------------------------

// A look-up for some sequences; _Call in kernels/suffix_index.py.
struct CopyCall {
  int64_t rows, most_nodes;
  int64_t own;  // 0: copies come from the memory alone, and none from texts
  const int64_t* committed;  // by slot
  int64_t committed_slot;
  const int64_t *slots, *lengths, *most;  // `most`: nodes of a row
  const int64_t* parts;                   // of the memory; 0: it is not asked
  const int64_t* tables;                  // which table of rates
  const int64_t *texts, *text_lengths;    // predictions: the address of each, 0 for none; and their numbers of tokens
  const int64_t* prompts;                 // numbers of tokens of the prompts
  int64_t *places, *placed;  // in the prediction or prompt, -1: none; and the sequence's length when that was known
  const float* rates;                     // [tables][cells]
  float least;                            // smallest survival
  int64_t* num_nodes;
  int64_t *tokens, *parents;  // [rows][most_nodes]
  float* survivals;
  int64_t* cells;
};

inline int length_class(int length) {
  return length < 5 ? length - 1 : length < 7 ? 4 : length < 10 ? 5 : length < MAX_MATCH ? 6 : 7;
}
inline int share_class(int count, int of) {
  return count == of ? 4 : 4 * count >= 3 * of ? 3 : 2 * count >= of ? 2 : 4 * count >= of ? 1 : 0;
}
inline int count_class(int of) { return of < 2 ? 0 : of < 4 ? 1 : of < 8 ? 2 : 3; }

// Grows the tree of one sequence: of all nodes that may be added, always the one most likely to be accepted.
class CopyTree {
 public:
  CopyTree(const CopyCall& call, const SuffixMemory* memory) : call_(call), memory_(memory) {
    if (!memory_) return;
    hashes_.resize(call_.rows);
    for (int64_t row = 0; row < call_.rows; ++row) {
      if (!call_.parts[row]) continue;
      hashes_[row] = memory_->hashes_of(end_of(row), call_.lengths[row], uint64_t(call_.parts[row]));
      memory_->prefetch(hashes_[row], call_.lengths[row], false);
    }
    for (int64_t row = 0; row < call_.rows; ++row)
      if (call_.parts[row]) memory_->prefetch(hashes_[row], call_.lengths[row], true);
  }

  void grow(int64_t row) {
    length_ = call_.lengths[row];
    tokens_ = end_of(row) - length_;
    use_table(call_.tables[row]);
    occurrences_.clear();
    single_.clear();
    text_ = {reinterpret_cast<const int64_t*>(call_.texts[row]), call_.text_lengths[row], true};
    if (!text_.tokens) text_ = {tokens_, call_.prompts[row], false};
    if (call_.own) find_own(tokens_, length_, {tokens_, length_, false}, occurrences_, single_);
    if (call_.own && text_.given) find_own(tokens_, length_, text_, occurrences_, single_);
    if (memory_ && call_.parts[row])
      memory_->find(end_of(row), length_, uint64_t(call_.parts[row]), hashes_[row], least_useful_, occurrences_);
    if (occurrences_.empty() || occurrences_[0].length == 1)
      occurrences_.insert(occurrences_.end(), single_.begin(), single_.end());
    if (call_.own) find_place_of(row);
    int longest = 0, nearest = 0;
    for (const Occurrence& each : occurrences_) {
      longest = std::max(longest, int(each.length));
      if (each.near && !each.own) nearest = std::max(nearest, int(each.length));
    }
    members_.clear();
    for (size_t i = 0; i < occurrences_.size(); ++i) {
      const Occurrence& each = occurrences_[i];
      const bool counts = 4 * each.length >= 3 * longest && (each.near || each.length > nearest);
      if (counts || each.gap >= 0) members_.push_back(int(i));
    }
    nodes_.clear();
    heap_.clear();
    expand(0, 0, 1.0f, 0, members_.size());
    const int64_t offset = row * call_.most_nodes, most = call_.most[row];
    int64_t count = 0;
    while (count < most && !heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end(), Later{nodes_});
      const Node node = nodes_[heap_.back()];
      heap_.pop_back();
      call_.tokens[offset + count] = node.token;
      call_.parents[offset + count] = node.parent;
      call_.survivals[offset + count] = node.survival;
      call_.cells[offset + count] = node.cell;
      ++count;
      expand(int(count), node.depth, node.survival, node.begin, node.end);
    }
    call_.num_nodes[row] = count;
  }

 private:
  const int64_t* end_of(int64_t row) const {
    return call_.committed + call_.slots[row] * call_.committed_slot + call_.lengths[row];
  }

  // Add the sequence's place in its text to the occurrences. It is kept if it is sure, or another one that is.
  void find_place_of(int64_t row) {
    Occurrence sure{};
    if (call_.places[row] >= 0) {
      const int64_t said = length_ - call_.prompts[row], since = length_ - call_.placed[row];
      const Occurrence place = find_place(text_, end_of(row), said, call_.places[row], since);
      if (place.length >= FIRM_MATCH) sure = place;
      if (place.length) occurrences_.push_back(place);
    }
    const int least = sure.length + FAR_MATCH;
    for (const Occurrence& each : occurrences_)
      if (each.own && each.gap < 0 && each.given == text_.given && int64_t(each.next) < text_.count &&
          each.length >= least && each.length > sure.length)
        sure = each;
    if (!sure.length) return;
    call_.places[row] = int64_t(sure.next);
    call_.placed[row] = length_;
  }

  // Take rates from this table, and find the smallest number of agreeing tokens that can reach the smallest survival.
  void use_table(int64_t table) {
    if (table == table_) return;
    table_ = table;
    rates_ = call_.rates + table * (NUM_KINDS * NUM_LENGTHS * NUM_SHARES * NUM_COUNTS);
    constexpr int cells = NUM_SHARES * NUM_COUNTS;
    const auto reaches = [&](int length) {
      for (int kind = 0; kind < PLACE_KIND; ++kind) {
        const float* of = rates_ + (kind * NUM_LENGTHS + length_class(length)) * cells;
        if (*std::max_element(of, of + cells) >= call_.least) return true;
      }
      return false;
    };
    least_useful_ = 1;
    while (least_useful_ <= MAX_MATCH && !reaches(least_useful_)) ++least_useful_;
  }

  struct Node {
    int parent, depth, cell;  // parent: column, 0 is the sequence's last token
    int64_t token;
    float survival;
    size_t begin, end;  // its occurrences, in members_
  };
  struct Later {
    const std::vector<Node>& nodes;
    bool operator()(int a, int b) const {
      return nodes[a].survival != nodes[b].survival ? nodes[a].survival < nodes[b].survival : a > b;
    }
  };

  // The token `depth` places after an occurrence. In the sequence itself, tokens that do not exist yet repeat the
  // period from the occurrence to the end.
  int64_t token_after(const Occurrence& each, int depth) const {
    if (!each.own) return memory_->token(each.next + depth);
    if (each.given) return int64_t(each.next) + depth < text_.count ? text_.tokens[each.next + depth] : SEPARATOR;
    return tokens_[each.next + depth % (length_ - int64_t(each.next))];
  }

  // Offer the children of a node, whose occurrences are members_[begin, end).
  void expand(int column, int depth, float survival, size_t begin, size_t end) {
    followers_.clear();
    for (size_t i = begin; i < end; ++i) {
      const int64_t token = token_after(occurrences_[members_[i]], depth);
      if (token != SEPARATOR) followers_.push_back({token, members_[i]});
    }
    const int total = int(followers_.size());
    if (total > 1) std::sort(followers_.begin(), followers_.end());
    for (size_t i = 0; i < followers_.size();) {
      const size_t first = members_.size();
      const int64_t token = followers_[i].token;
      int longest = 0, kinds = 0;
      int gap = -1;
      for (; i < followers_.size() && followers_[i].token == token; ++i) {
        const Occurrence& each = occurrences_[followers_[i].occurrence];
        longest = std::max(longest, int(each.length));
        kinds |= each.own ? 1 : 2;
        gap = std::max(gap, each.gap);
        members_.push_back(followers_[i].occurrence);
      }
      const int count = int(members_.size() - first);
      const bool is_place = gap >= 0;
      int cell = (is_place ? PLACE_KIND : kinds - 1) * NUM_LENGTHS + length_class(std::min(MAX_MATCH, longest + depth));
      cell = (cell * NUM_SHARES + (is_place ? NUM_SHARES - 1 : share_class(count, total))) * NUM_COUNTS +
             (is_place ? gap : count_class(total));
      const float reached = survival * rates_[cell];
      if (reached < call_.least) {
        members_.resize(first);
        continue;
      }
      nodes_.push_back({column, depth + 1, cell, token, reached, first, members_.size()});
      heap_.push_back(int(nodes_.size()) - 1);
      std::push_heap(heap_.begin(), heap_.end(), Later{nodes_});
    }
  }

  struct Follower {
    int64_t token;
    int occurrence;
    bool operator<(const Follower& other) const {
      return token != other.token ? token < other.token : occurrence < other.occurrence;
    }
  };

  const CopyCall& call_;
  const SuffixMemory* memory_;
  const int64_t* tokens_ = nullptr;
  Text text_{};
  const float* rates_ = nullptr;
  int64_t table_ = -1;
  int least_useful_ = 1;
  std::vector<SuffixMemory::Hashes> hashes_;
  int64_t length_ = 0;
  std::vector<Occurrence> occurrences_, single_;
  std::vector<int> members_, heap_;
  std::vector<Node> nodes_;
  std::vector<Follower> followers_;
};

inline void look_up_copies(CopyCall& call, SuffixMemory* memory) {
  std::unique_lock<std::mutex> lock;
  if (memory) lock = std::unique_lock<std::mutex>(memory->mutex());
  CopyTree tree(call, memory);
  for (int64_t row = 0; row < call.rows; ++row) tree.grow(row);
}

}  // namespace
