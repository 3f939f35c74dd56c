// Copied proposals: what followed the last tokens of a sequence before, earlier in the same sequence and in a bounded
// memory of other sequences, as a tree of the likeliest nodes. kernels/suffix_index.py documents the results.
//
// Suffix decoding (Oliaro et al., arXiv 2411.04975) keeps a suffix tree. Here the memory is a ring of tokens, and for
// each length in ORDERS a hash table of chains: all positions that follow the same ORDERS[o] tokens, latest first. A
// look-up walks the chains of the longest agreeing n-gram and compares tokens backwards from there. Inserting a token is
// a few writes, forgetting the oldest ones is overwriting them, and nothing is allocated after the start. The sequence's
// own tokens are scanned, which takes about a nanosecond a token.
//
// An answer that repeats a text with small differences, its prediction or something in its prompt, has a *place* there.
// After a difference one agreeing token near it says more than elsewhere, so it is found again without waiting for more.
//
// A sequence is remembered for a *part*, which says who may read it and, in its last DOMAIN_BITS bits, of which domain it
// is (serve/speculation/sources/memory.py). Who may read is compared exactly, not by a hash. What a sequence's own domain
// has remembered is preferred: other occurrences count only if more tokens agree.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace {

// Sizes that kernels/suffix_index.py knows too.
constexpr int MAX_MATCH = 16;
constexpr int NUM_KINDS = 4, NUM_LENGTHS = 8, NUM_SHARES = 5, NUM_COUNTS = 4;

constexpr int ORDERS[] = {8, 4, 2, 1}, NUM_ORDERS = 4;
constexpr int MAX_OWN = 16, MAX_REMEMBERED = 32, MAX_WALKED = 96;
constexpr int64_t PLACE_BACK = 16, PLACE_AHEAD = 128;  // how far from its last place a sequence is looked for
constexpr int START_MATCH = 4;  // that a text and an answer both begin counts as so many agreeing tokens
constexpr int FIRM_MATCH = 2;   // agreeing tokens from which on a place near the last one counts as the new one,
constexpr int FAR_MATCH = 8;    // and from which on, or so many more than near it, one anywhere does
constexpr int DOMAIN_BITS = 12;  // of a part; the others say who may read it
constexpr int PLACE_KIND = 3;
constexpr int32_t SEPARATOR = -1;  // before every inserted sequence

// An earlier occurrence of the last `length` tokens.
struct Occurrence {
  uint64_t next;  // position of the token that followed
  int32_t length;
  bool own;   // in the sequence itself or in its text
  bool near;  // that, or in a sequence of the same domain
  bool given = false;  // in a text that is given with the sequence
  int gap = -1;        // of the sequence's place: how far it is from where it was expected, in classes; -1: elsewhere
};

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

class SuffixMemory {
 public:
  // `capacity`: tokens, separators included. `heads`: of each table of chains, a power of two.
  SuffixMemory(int64_t capacity, int64_t heads) : capacity_(capacity), mask_(heads - 1) {
    places_ = static_cast<Place*>(std::calloc(size_t(capacity), sizeof(Place)));
    for (uint32_t*& each : heads_) each = static_cast<uint32_t*>(std::calloc(size_t(heads), sizeof(uint32_t)));
  }
  // False: the system did not give the memory.
  bool is_whole() const {
    bool whole = places_ != nullptr;
    for (const uint32_t* each : heads_) whole &= each != nullptr;
    return whole;
  }
  ~SuffixMemory() {
    std::free(places_);
    for (uint32_t* each : heads_) std::free(each);
  }
  SuffixMemory(const SuffixMemory&) = delete;
  SuffixMemory& operator=(const SuffixMemory&) = delete;

  // Remember a sequence for a part. Its first `context` tokens help to recognise what follows, and are not proposed.
  void insert(const int32_t* tokens, int64_t count, int64_t context, uint64_t part) {
    std::lock_guard<std::mutex> lock(mutex_);
    append(SEPARATOR, part);
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t at = append(tokens[i], part);
      if (i < context) continue;
      const Hashes hashes = hashes_of(tokens + i, i, part);
      for (int o = 0; o < NUM_ORDERS; ++o) {
        if (i < ORDERS[o]) continue;
        uint32_t& head = heads_[o][hashes.of[o]];
        place(at).links[o] = head;
        head = uint32_t(at);
      }
    }
  }

  // Number of tokens held, and of tokens forgotten, separators included.
  void counts(int64_t* held, int64_t* forgotten) {
    std::lock_guard<std::mutex> lock(mutex_);
    *held = int64_t(std::min<uint64_t>(end_ - 1, capacity_));
    *forgotten = int64_t(end_ - 1) - *held;
  }

  // Hashes of the last tokens, by order.
  struct Hashes {
    uint64_t of[NUM_ORDERS];
  };

  // Of the tokens before `end`; those of more than `length` tokens are undefined.
  template <typename Token>
  Hashes hashes_of(const Token* end, int64_t length, uint64_t part) const {
    Hashes hashes{};
    uint64_t h = part >> DOMAIN_BITS;
    for (int i = 1, o = NUM_ORDERS - 1; o >= 0 && i <= length; ++i) {
      h = mix(h * 0x9e3779b97f4a7c15ull + uint64_t(uint32_t(end[-i])) + 1);
      if (i == ORDERS[o]) hashes.of[o--] = h & mask_;
    }
    return hashes;
  }

  // Have the first places of the chains read into the cache: first their heads, then, in a second call, the places.
  void prefetch(const Hashes& hashes, int64_t length, bool places) const {
    for (int o = 0; o < NUM_ORDERS; ++o) {
      if (length < ORDERS[o]) continue;
      const uint32_t* head = &heads_[o][hashes.of[o]];
      if (!places) {
        __builtin_prefetch(head);
      } else if (*head) {
        __builtin_prefetch(&place(position(*head)));
      }
    }
  }

  // Add occurrences of the tokens before `end` in the part's sequences: the longest n-grams first, of equal ones the
  // latest. Those of one token are added only if there are no others in `found`. Chains are not walked if all that they
  // could add, and there is nothing else, are occurrences of fewer tokens than `least_useful`.
  void find(const int64_t* end, int64_t length, uint64_t part, const Hashes& hashes, int least_useful,
            std::vector<Occurrence>& found) const {
    const size_t first = found.size();
    int walked = 0;
    for (int o = 0; o < NUM_ORDERS; ++o) {
      if (length < ORDERS[o] || (ORDERS[o] == 1 && !found.empty())) continue;
      if (found.empty() && (o ? ORDERS[o - 1] - 1 : MAX_MATCH) < least_useful) break;
      uint64_t before = end_;
      uint32_t link = heads_[o][hashes.of[o]];
      while (link && walked < MAX_WALKED && found.size() - first < MAX_REMEMBERED) {
        const uint64_t at = position(link);
        if (at >= before || !holds(at)) break;
        before = at;
        ++walked;
        link = place(at).links[o];
        const uint64_t of = place(at).part;
        if (of >> DOMAIN_BITS != part >> DOMAIN_BITS) continue;
        const int agreeing = agreement(end, length, at);
        if (agreeing < ORDERS[o]) continue;  // another n-gram with the same hash
        if (o && agreeing >= ORDERS[o - 1]) continue;  // found by the longer n-gram
        found.push_back({at, agreeing, false, of == part});
      }
    }
  }

  // The token at a position, or SEPARATOR.
  int32_t token(uint64_t at) const { return at < end_ ? place(at).token : SEPARATOR; }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Place {
    int32_t token;
    uint64_t part;
    uint32_t links[NUM_ORDERS];  // the previous position that follows the same n-gram
  };

  Place& place(uint64_t at) const { return places_[at % capacity_]; }

  // The latest position whose last bits a link has.
  uint64_t position(uint32_t link) const { return end_ - uint32_t(uint32_t(end_) - link); }

  uint64_t append(int32_t token, uint64_t part) {
    place(end_).token = token;
    place(end_).part = part;
    return end_++;
  }

  bool holds(uint64_t at) const { return at + capacity_ >= end_ && at < end_ && at > 0; }

  // How many tokens before `end` equal those before the position `at`.
  int agreement(const int64_t* end, int64_t length, uint64_t at) const {
    const int most = int(std::min<int64_t>(MAX_MATCH, length));
    int n = 0;
    while (n < most && holds(at - n - 1) && place(at - n - 1).token == end[-n - 1]) ++n;
    return n;
  }

  uint64_t capacity_, mask_;
  uint64_t end_ = 1;  // position of the next token; 0 is none
  Place* places_;
  uint32_t* heads_[NUM_ORDERS];  // the last position that follows an n-gram, by its hash
  std::mutex mutex_;
};

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
