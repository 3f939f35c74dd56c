// Vector types, aligned buffers, prefetching and conversion to bf16. The vector types are compiler extensions, so the
// same code compiles for processors without AVX-512.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int BLOCK = 32;  // outputs of a block of packed weights: two vectors

typedef float f16v __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u16v __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16v __attribute__((vector_size(64), aligned(4)));

// The widest vectors that fit a register of the processor. Hot loops use these, because GCC splits a wider vector and
// keeps its parts in memory: with AVX2, products took eight times as long.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float fnv __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t unv __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t inv __attribute__((vector_size(4 * LANES), aligned(4)));
constexpr int BLOCK_VECTORS = BLOCK / LANES;

inline fnv spread(float x) { return x - fnv{}; }

// a * b + c, rounded once where the processor can. The compiler fuses nothing by itself (-ffp-contract=off): whether GCC
// does depends on the loop and on the processor it tunes for, so a row's bits would depend on how many rows there are.
inline fnv fused(fnv a, fnv b, fnv c) {
#if defined(__AVX512F__)
  return (fnv)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (fnv)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (fnv)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
inline fnv fused(float a, fnv b, fnv c) { return fused(spread(a), b, c); }
inline fnv fused(fnv a, float b, fnv c) { return fused(a, spread(b), c); }
inline fnv fused(fnv a, fnv b, float c) { return fused(a, b, spread(c)); }
inline fnv fused(fnv a, float b, float c) { return fused(a, spread(b), spread(c)); }

// Applies a function of vectors that fit a register to each part of wider ones: GCC would keep those in memory.
template <class Function, class... Wide>
inline f16v by_lanes(Function function, Wide... x) {
  const auto part = [](const f16v& of, int i) {
    fnv lanes;
    std::memcpy(&lanes, reinterpret_cast<const char*>(&of) + i * sizeof lanes, sizeof lanes);
    return lanes;
  };
  f16v to;
  for (int i = 0; i < 16 / LANES; ++i) {
    const fnv lanes = function(part(x, i)...);
    std::memcpy(reinterpret_cast<char*>(&to) + i * sizeof lanes, &lanes, sizeof lanes);
  }
  return to;
}
#if !defined(__AVX512F__)
inline f16v fused(f16v a, f16v b, f16v c) {
  return by_lanes([](fnv x, fnv y, fnv z) { return fused(x, y, z); }, a, b, c);
}
#endif

// Aligns to cache lines: loading a tile row that spans two lines takes twice as long.
template <class T>
struct LineAllocator {
  typedef T value_type;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t{64}); }
  friend bool operator==(const LineAllocator&, const LineAllocator&) { return true; }
  friend bool operator!=(const LineAllocator&, const LineAllocator&) { return false; }
};
// Memory that is kept between calls; it grows and never shrinks.
template <class T>
struct Buffer : std::vector<T, LineAllocator<T>> {
  T* at_least(size_t size) {
    if (this->size() < size) this->resize(size);
    return this->data();
  }
};

// Zero-extends 16 values to 32 bits. Compilers would split the generic form into two vectors, so AVX-512 has its own.
inline u16v widen16(const uint16_t* from) {
#if defined(__AVX512F__)
  return (u16v)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  typedef uint16_t h16v __attribute__((vector_size(32), aligned(2)));
  return __builtin_convertvector(*reinterpret_cast<const h16v*>(from), u16v);
#endif
}

// 16 values, as fp32 from fp32 or bf16.
inline f16v load16(const float* from) { return *reinterpret_cast<const f16v*>(from); }
inline f16v load16(const uint16_t* from) { return (f16v)(widen16(from) << 16); }

// LANES values, as fp32 from fp32 or bf16.
inline fnv load_lanes(const float* from) { return *reinterpret_cast<const fnv*>(from); }
inline fnv load_lanes(const uint16_t* from) {
#if defined(__AVX512F__)
  return (fnv)(widen16(from) << 16);
#elif defined(__AVX2__)
  return (fnv)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
#else
  typedef uint16_t hnv __attribute__((vector_size(2 * LANES), aligned(2)));
  return (fnv)(__builtin_convertvector(*reinterpret_cast<const hnv*>(from), unv) << 16);
#endif
}

// x[0] gets the first half of x[0][0], x[1][0], x[0][1], x[1][1], …, x[1] the second.
inline void interleave(fnv* x) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512 a = (__m512)x[0], b = (__m512)x[1];
  x[0] = (fnv)_mm512_permutex2var_ps(a, low, b);
  x[1] = (fnv)_mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps((__m256)x[0], (__m256)x[1]);
  const __m256 high = _mm256_unpackhi_ps((__m256)x[0], (__m256)x[1]);
  x[0] = (fnv)_mm256_permute2f128_ps(low, high, 0x20), x[1] = (fnv)_mm256_permute2f128_ps(low, high, 0x31);
#else
  float in_order[2 * LANES];
  for (int i = 0; i < LANES; ++i) in_order[2 * i] = x[0][i], in_order[2 * i + 1] = x[1][i];
  std::memcpy(x, in_order, sizeof in_order);
#endif
}

// Prefetch `bytes`. LOCALITY 3: into the first-level cache; 2: into the second.
template <int LOCALITY = 3>
inline void prefetch(const void* from, int bytes) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(from) + line, 0, LOCALITY);
}

// Prefetches weights while they are read sequentially: between arithmetic, out-of-order execution does not reach far
// enough ahead. A thread's share of a matrix ends at `end`; it continues reading at `next`.
struct Stream {
  static constexpr int AHEAD = 16384;  // bytes; measured, on AMX and AVX-512
  const char* end;
  const char* next;

  // Prefetch the BYTES that will be read AHEAD bytes after `at`.
  template <int BYTES, int LOCALITY = 3>
  void ask(const void* at) const {
    const char* place = static_cast<const char*>(at) + AHEAD;
    if (place >= end) place = next + (place - end);
    prefetch<LOCALITY>(place, BYTES);
  }
};

// The nearest integers; of two, the even one.
inline i16v nearest(f16v x) {
#if defined(__AVX512F__)
  return (i16v)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof halves);
  const __m256i rounded[2] = {_mm256_cvtps_epi32(halves[0]), _mm256_cvtps_epi32(halves[1])};
  i16v to;
  std::memcpy(&to, rounded, sizeof to);
  return to;
#else
  i16v to;
  for (int i = 0; i < 16; ++i) to[i] = int32_t(std::lrint(x[i]));
  return to;
#endif
}

// Truncates 16 values within 8 bits; the value at place order[i] is stored at place i.
inline void narrow8(i16v from, const uint8_t* order, int8_t* to) {
#if defined(__AVX512F__)
  const __m128i places = _mm_loadu_si128(reinterpret_cast<const __m128i*>(order));
  const __m128i values = _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)from), places);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), values);
#elif defined(__AVX2__)
  __m256i halves[2];
  std::memcpy(halves, &from, sizeof halves);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(halves[0], halves[1]), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  const __m128i places = _mm_loadu_si128(reinterpret_cast<const __m128i*>(order));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(bytes, places));
#else
  for (int i = 0; i < 16; ++i) to[i] = int8_t(from[order[i]]);
#endif
}

// Reductions over the lanes of a vector; the sum of floats has a fixed order, which depends on the processor.
#if defined(__AVX512F__)
inline float largest(f16v x) { return _mm512_reduce_max_ps((__m512)x); }
inline float total(f16v x) { return _mm512_reduce_add_ps((__m512)x); }
inline int32_t total(i16v x) { return _mm512_reduce_add_epi32((__m512i)x); }
#else
// Halves are combined until one number is left.
template <class Vector, class Combine>
inline auto reduce(Vector x, Combine combine) {
  typedef std::remove_reference_t<decltype(x[0])> Number;
  typedef Number Four __attribute__((vector_size(16), aligned(4)));
  constexpr int PARTS = int(sizeof(Vector) / sizeof(Four));
  Four parts[PARTS];
  std::memcpy(parts, &x, sizeof parts);
  for (int half = PARTS / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] = combine(parts[i], parts[i + half]);
  const Four all = parts[0], two = combine(all, Four{all[2], all[3], all[0], all[1]});
  return combine(two, Four{two[1], two[0], two[3], two[2]})[0];
}
constexpr auto LARGER = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto SUM = [](auto a, auto b) { return a + b; };
inline float largest(f16v x) { return reduce(x, LARGER); }
inline float largest(fnv x) { return reduce(x, LARGER); }
inline float total(f16v x) { return reduce(x, SUM); }
inline float total(fnv x) { return reduce(x, SUM); }
inline int32_t total(i16v x) { return reduce(x, SUM); }
#endif

// exp(x) for x <= 0, relative error below 2e-7: 2^n * polynomial (from Cephes' expf).
inline fnv exp_lanes(fnv x) {
  const fnv lowest = fnv{} - 87.0f;
  x = x < lowest ? lowest : x;
  const fnv shifter = fnv{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const fnv n = fused(x, 1.44269504088896341f, shifter) - shifter;
  const fnv r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
  fnv p = fused(r, 1.9875691500e-4f, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p * r, r, r) + 1.0f;
  const inv scale = (__builtin_convertvector(n, inv) + 127) << 23;
  return p * (fnv)scale;
}
inline f16v exp_vector(f16v x) { return by_lanes(exp_lanes, x); }

// log(x) for normal x > 0, relative error below 3e-7: x = 2^n m with sqrt(1/2) <= m < sqrt(2), and a polynomial in m - 1
// (from Cephes' logf).
inline fnv log_lanes(fnv x) {
  constexpr int32_t SQRT_HALF = 0x3f3504f3;  // bits of sqrt(1/2)
  const inv above = (inv)x - SQRT_HALF;
  const fnv n = __builtin_convertvector(above >> 23, fnv);
  const fnv r = (fnv)((above & 0x007fffff) + SQRT_HALF) - 1.0f;
  fnv p = fused(r, 7.0376836292e-2f, -1.1514610310e-1f);
  p = fused(p, r, 1.1676998740e-1f);
  p = fused(p, r, -1.2420140846e-1f);
  p = fused(p, r, 1.4249322787e-1f);
  p = fused(p, r, -1.6668057665e-1f);
  p = fused(p, r, 2.0000714765e-1f);
  p = fused(p, r, -2.4999993993e-1f);
  p = fused(p, r, 3.3333331174e-1f);
  const fnv squared = r * r;
  const fnv rest = fused(squared, -0.5f, fused(p * r, squared, n * -2.12194440e-4f));
  return fused(n, 0.693359375f, r + rest);
}
inline f16v log_vector(f16v x) { return by_lanes(log_lanes, x); }

// True if any lane of a is less than that of b.
inline bool any_less(f16v a, f16v b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ) != 0;
#else
  bool found = false;
  for (int i = 0; i < 16; ++i) found |= a[i] < b[i];
  return found;
#endif
}

inline uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 64);  // keep NaN
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float from_bf16(uint16_t h) {
  uint32_t u = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

}  // namespace
