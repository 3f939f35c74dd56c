// The linear layer with weights of four or eight bits that share a scale in groups of 32 along the inputs, as
// llama.cpp's Q4_1 and Q8_0 do. Inputs are rounded to sixteen bits, a scale a group, which is finer than bf16. Products
// are summed as integers inside a group, which is exact in any order, and over groups in fp32 in one order: as
// batch-invariant as the other kinds, with a third or half of bf16's weights to read. grouped.py packs the weights.
// Source of the formats: ggml-common.h (block_q4_1, block_q8_0); of the instruction: VPDPWSSD, Intel 64 and IA-32
// Architectures Software Developer's Manual, vol. 2.
#pragma once

#include "words.hpp"

#include <cmath>
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 32;               // inputs that share a scale
constexpr float INPUT_LIMIT = 32639.0f;  // of a rounded input: 127 * 256 + 127, so that it splits into signed bytes

struct InputGroup {  // of one row
  int16_t values[GROUP];
  float scale;
  int32_t sum;  // of the values
};

// One group of inputs of a block of outputs. A 32-bit lane belongs to one output and holds two neighbouring inputs in
// its halves, as often as bits allow: inputs 2n and 2n + 1 of a vector's share in bits BITS * n of either half.
template <int BITS>
struct WeightGroup {
  static constexpr bool HAS_MIN = BITS == 4;  // eight bits are symmetric around 128
  uint16_t scales[BLOCK];                     // fp16
  uint16_t mins[HAS_MIN ? BLOCK : 0];
  uint32_t words[BLOCK / 16][GROUP * BITS / 32][16];
};

// fp16 to fp32; exact, and finite numbers only.
inline f16v from_fp16(const uint16_t* from) {
  typedef uint16_t h16v __attribute__((vector_size(32), aligned(2)));
  const u16v h = __builtin_convertvector(*reinterpret_cast<const h16v*>(from), u16v);
  const f16v size = (f16v)((h & 0x7fffu) << 13) * 0x1p112f;
  return (f16v)((u16v)size | (h & 0x8000u) << 16);
}

// Two inputs of a row (the halves of `pair`) times those of 16 outputs, added to their sums.
inline i16v add_products(i16v sums, u16v weights, int32_t pair) {
#if defined(__AVX512VNNI__)
  return (i16v)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(pair));
#else
  return sums + (i16v)(weights & 0xffffu) * int32_t(int16_t(pair)) + (i16v)(weights >> 16) * (pair >> 16);
#endif
}

// A group of a row's inputs to integers. The scale is NaN where an input is not finite, and so are all sums with it.
inline void round_group(const float* x, InputGroup* out) {
  typedef int16_t s16v __attribute__((vector_size(32), aligned(2)));
  const f16v v[2] = {*reinterpret_cast<const f16v*>(x), *reinterpret_cast<const f16v*>(x + 16)};
  const f16v size[2] = {(f16v)((u16v)v[0] & 0x7fffffffu), (f16v)((u16v)v[1] & 0x7fffffffu)};
  const f16v larger = size[0] > size[1] ? size[0] : size[1], poison = (v[0] + v[1]) * 0.0f;
  float most = 0.0f, none = 0.0f;
  for (int i = 0; i < 16; ++i) {
    most = larger[i] > most ? larger[i] : most;
    none += poison[i];
  }
  out->scale = most / INPUT_LIMIT + none;
  const float factor = most > 1e-30f && out->scale == out->scale ? INPUT_LIMIT / most : 0.0f;
  constexpr float TO_INTEGER = 0x1.8p23f;  // added, it leaves the nearest integer in the low bits
  i16v sums = {};
  for (int i = 0; i < 2; ++i) {
    const f16v scaled = factor > 0.0f ? v[i] * factor : f16v{};
    const i16v q = (i16v)(scaled + TO_INTEGER) - 0x4b400000;
    sums += q;
    *reinterpret_cast<s16v*>(out->values + 16 * i) = __builtin_convertvector(q, s16v);
  }
  out->sum = 0;
  for (int i = 0; i < 16; ++i) out->sum += sums[i];
}

inline int num_groups(int inputs) { return (inputs + GROUP - 1) / GROUP; }

template <int BITS>
struct Grouped {
  typedef WeightGroup<BITS> Weight;
  typedef InputGroup Input;
  static constexpr int SHARES = 16 / BITS;  // pairs of inputs in a lane
  static constexpr uint32_t MASK = BITS == 4 ? 0x000f000fu : 0x00ff00ffu;
  static ptrdiff_t block_size(int groups) { return groups; }

  template <int ROWS>
  static void sums(const Weight* w, const InputGroup* x, ptrdiff_t x_stride, int groups, f16v (*total)[2]) {
    constexpr int CHAINS = ROWS < 3 ? 2 : 1;  // a sum waits for itself: with few of them each is made in two parts
    for (int group = 0; group < groups; ++group, ++w, ++x) {
      i16v dots[CHAINS][ROWS][2] = {};
      for (int r = 0; r < ROWS && !Weight::HAS_MIN; ++r)
        dots[0][r][0] = dots[0][r][1] = i16v{} - 128 * x[r * x_stride].sum;
      for (int line = 0; line < GROUP * BITS / 32; ++line) {
        const u16v low = *reinterpret_cast<const u16v*>(w->words[0][line]);
        const u16v high = *reinterpret_cast<const u16v*>(w->words[1][line]);
        for (int n = 0; n < SHARES; ++n) {
          const u16v w0 = (low >> (BITS * n)) & MASK, w1 = (high >> (BITS * n)) & MASK;
          i16v(*sums)[2] = dots[n % CHAINS];
          for (int r = 0; r < ROWS; ++r) {
            int32_t pair;
            std::memcpy(&pair, x[r * x_stride].values + 2 * (line * SHARES + n), 4);
            sums[r][0] = add_products(sums[r][0], w0, pair);
            sums[r][1] = add_products(sums[r][1], w1, pair);
          }
        }
      }
      for (int v = 0; v < 2; ++v) {
        const f16v scales = from_fp16(w->scales + 16 * v), mins = Weight::HAS_MIN ? from_fp16(w->mins + 16 * v) : f16v{};
        for (int r = 0; r < ROWS; ++r) {
          const InputGroup& inputs = x[r * x_stride];
          for (int chain = 1; chain < CHAINS; ++chain) dots[0][r][v] += dots[chain][r][v];
          total[r][v] += __builtin_convertvector(dots[0][r][v], f16v) * (scales * inputs.scale);
          if (Weight::HAS_MIN) total[r][v] += mins * (inputs.scale * float(inputs.sum));
        }
      }
    }
  }
};

}  // namespace
