// Gumbel noise that is a hash of a request's key, an index in its output and a token: the noise of
// modules/sampling/noise.py, which documents it, for 16 tokens at a time. The bits of the hash are the same, and the
// noise differs by rounding.
#pragma once

#include "vectors.hpp"

namespace {

// What a draw's noise depends on besides the token.
struct NoiseKey {
  uint32_t low, high;
};

// SplitMix64's bit mixer (Steele, Lea, Flood 2014).
inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

inline NoiseKey noise_key(int64_t key, int64_t position) {
  const uint64_t word = mix64(mix64(uint64_t(key)) + (uint64_t(position) + 1) * 0x9e3779b97f4a7c15u);
  return NoiseKey{uint32_t(word), uint32_t(word >> 32)};
}

// MurmurHash3's 32-bit finaliser (Appleby 2011).
inline u16v fmix32(u16v h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

inline u16v noise_bits(const NoiseKey& key, u16v tokens) { return fmix32(fmix32(tokens ^ key.low) + key.high); }

// Tokens `first`, `first` + 1, …
inline u16v tokens_from(uint32_t first) {
  const u16v lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lanes + first;
}

// v in (0, 1) from uniform bits.
inline f16v uniform_of(u16v bits) {
  const f16v v = (__builtin_convertvector(bits, f16v) + 0.5f) * 0x1p-32f;
  const f16v most = f16v{} + (1.0f - 0x1p-24f);
  return v < most ? v : most;
}

// -log(-log1p(-v)). log1p is log(u) * -v / (u - 1) with u the rounded 1 - v, whose error cancels (Kahan; in Hewlett-
// Packard's HP-15C Advanced Functions Handbook, 1982).
inline f16v gumbel_of(f16v v) {
  const f16v u = 1.0f - v, one = f16v{} + 1.0f;
  const f16v exponential = u == one ? v : log_vector(u) * v / (u - 1.0f);
  return -log_vector(exponential);
}

inline f16v gumbel(const NoiseKey& key, u16v tokens) { return gumbel_of(uniform_of(noise_bits(key, tokens))); }

// Bits and noise of some tokens, for tests.
inline void noise_of_tokens(int64_t key, int64_t position, const int64_t* tokens, int64_t count, int64_t* bits,
                            float* noise) {
  const NoiseKey of_draw = noise_key(key, position);
  for (int64_t first = 0; first < count; first += 16) {
    const int lanes = count - first < 16 ? int(count - first) : 16;
    u16v ids = u16v{};
    for (int i = 0; i < lanes; ++i) ids[i] = uint32_t(tokens[first + i]);
    const u16v hashed = noise_bits(of_draw, ids);
    const f16v values = gumbel(of_draw, ids);
    for (int i = 0; i < lanes; ++i) bits[first + i] = hashed[i], noise[first + i] = values[i];
  }
}

}  // namespace
