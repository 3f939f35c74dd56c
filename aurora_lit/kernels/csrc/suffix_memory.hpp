// Occurrences of a sequence's last tokens in other sequences: a bounded memory of those that have ended.
//
// Suffix decoding (Oliaro et al., arXiv 2411.04975) keeps a suffix tree. Here the memory is a ring of tokens, and for
// each length in ORDERS a hash table of chains: all positions that follow the same ORDERS[o] tokens, latest first. A
// look-up walks the chains of the longest agreeing n-gram and compares tokens backwards from there. Inserting a token is
// a few writes, forgetting the oldest ones is overwriting them, and nothing is allocated after the start.
//
// A sequence is remembered for a *part*, which says who may read it and, in its last DOMAIN_BITS bits, of which domain it
// is (serve/speculation/sources/memory.py). Who may read is compared exactly, not by a hash.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace {

constexpr int MAX_MATCH = 16;  // kernels/suffix_index.py knows it too

constexpr int ORDERS[] = {8, 4, 2, 1}, NUM_ORDERS = 4;
constexpr int MAX_REMEMBERED = 32, MAX_WALKED = 96;
constexpr int DOMAIN_BITS = 12;    // of a part; the others say who may read it
constexpr int32_t SEPARATOR = -1;  // before every inserted sequence

// An earlier occurrence of the last `length` tokens.
struct Occurrence {
  uint64_t next;  // position of the token that followed
  int32_t length;
  bool own;            // in the sequence itself or in its text
  bool near;           // that, or in a sequence of the same domain
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

}  // namespace
