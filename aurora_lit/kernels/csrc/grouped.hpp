// The grouped formats: weights of 4 or 8 bits with a scale for every 32 inputs, as llama.cpp's Q4_1 and Q8_0. Inputs
// are rounded to 12 or 16 bits with a scale per group, which is finer than bf16 for the inputs that contribute most to
// a sum. Products are summed as integers within a group, which is exact in any order, and over groups in fp32 in a
// fixed order. So this is as batch-invariant as the other formats, and reads a third or half as many bytes as bf16.
// kernels/quantization.py packs the weights. Source of the formats: ggml-common.h (block_q4_1, block_q8_0); of the
// instruction: VPDPWSSD, Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2.
#pragma once

#include "vectors.hpp"

#include <cmath>
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define AURORA_GROUPED_TILES 1  // grouped_tiles.hpp
#endif

namespace {

constexpr int GROUP = 32;  // inputs that share a scale
// A rounded input is split into two signed bytes: INPUT_STEP * high + low. With weights of 4 bits, a weight times the
// step still fits into a byte.
template <int BITS>
constexpr int INPUT_STEP = BITS == 4 ? 16 : 256;
template <int BITS>
constexpr float INPUT_LIMIT = 127 * INPUT_STEP<BITS> + INPUT_STEP<BITS> / 2 - 1;

struct InputGroup {  // of one row
  int16_t values[GROUP];
#if defined(AURORA_GROUPED_TILES)
  int8_t high[GROUP], low[GROUP];  // value = step * high + low, in the order of a weight's bytes; with 8 bits only
#endif
  float scale;
  int32_t sum;       // of the values
  float scaled_sum;  // scale * sum
};

// One group of inputs of a block of outputs. A 32-bit lane belongs to one output and holds SHARES pairs of neighbouring
// inputs, one in each half: inputs 2n and 2n + 1 of the lane are at bit BITS * n of the two halves.
template <int BITS>
struct WeightGroup {
  static constexpr bool HAS_MIN = BITS == 4;  // 8-bit weights are symmetric around 128
  uint16_t scales[BLOCK];                     // fp16
  uint16_t mins[HAS_MIN ? BLOCK : 0];
  uint32_t words[BLOCK / 16][GROUP * BITS / 32][16];
};

// fp16 to fp32; exact, for finite numbers only.
inline f16v from_fp16(const uint16_t* from) {
#if defined(__AVX512F__)
  return (f16v)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  const u16v h = widen16(from);
  const f16v size = (f16v)((h & 0x7fffu) << 13) * 0x1p112f;
  return (f16v)((u16v)size | (h & 0x8000u) << 16);
#endif
}

// Two inputs of a row (the halves of `pair`) times their weights for 16 outputs, added to the outputs' sums.
inline i16v add_products(i16v sums, u16v weights, int32_t pair) {
#if defined(__AVX512VNNI__)
  return (i16v)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(pair));
#else
  return sums + (i16v)(weights & 0xffffu) * int32_t(int16_t(pair)) + (i16v)(weights >> 16) * (pair >> 16);
#endif
}

#if defined(AURORA_GROUPED_TILES)
// The input to which each byte of a weight group belongs, after its pairs are split into bytes.
template <int BITS>
struct LaneOrder {
  uint16_t input[GROUP];
  constexpr LaneOrder() : input() {
    constexpr int SPAN = 32 / BITS;  // inputs of a line of lanes
    for (int i = 0; i < GROUP; ++i) {
      const int pair = i % SPAN / 2, half = i % 2;
      const int piece = BITS == 4 ? pair % 2 : 0, byte = BITS == 4 ? pair / 2 : pair;
      input[i / SPAN * SPAN + 4 * piece + 2 * half + byte] = uint16_t(i);
    }
  }
};
template <int BITS>
constexpr LaneOrder<BITS> LANE_ORDER;
#endif

// Round a group of a row's inputs to integers. If an input is not finite, the scale is NaN, and so are all sums.
template <int BITS>
inline void round_group(const float* x, InputGroup* out) {
  const f16v v[2] = {*reinterpret_cast<const f16v*>(x), *reinterpret_cast<const f16v*>(x + 16)};
  const f16v size[2] = {(f16v)((u16v)v[0] & 0x7fffffffu), (f16v)((u16v)v[1] & 0x7fffffffu)};
  const f16v larger = size[0] > size[1] ? size[0] : size[1], poison = (v[0] + v[1]) * 0.0f;
  const float most = largest(larger), none = total(poison);
  out->scale = most / INPUT_LIMIT<BITS> + none;
  const float factor = most > 1e-30f && out->scale == out->scale ? INPUT_LIMIT<BITS> / most : 0.0f;
  constexpr float TO_INTEGER = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  i16v sums = {};
  for (int i = 0; i < 2; ++i) {
    const f16v scaled = factor > 0.0f ? v[i] * factor : f16v{};
    const i16v q = (i16v)(scaled + TO_INTEGER) - 0x4b400000;
    sums += q;
    narrow16(q, out->values + 16 * i);
  }
  out->sum = total(sums);
  out->scaled_sum = out->scale * float(out->sum);
}

#if defined(AURORA_GROUPED_TILES)
// Split a group's values into signed bytes, in the order of a weight's bytes.
template <int BITS>
inline void split_bytes(const InputGroup& group, int8_t* high_bytes, int8_t* low_bytes) {
  const __m512i values = _mm512_loadu_si512(group.values), order = _mm512_loadu_si512(LANE_ORDER<BITS>.input);
  constexpr int STEP = INPUT_STEP<BITS>, SHIFT = BITS == 4 ? 4 : 8;
  const __m512i high = _mm512_srai_epi16(_mm512_add_epi16(values, _mm512_set1_epi16(STEP / 2)), SHIFT);
  const __m512i low = _mm512_sub_epi16(values, _mm512_slli_epi16(high, SHIFT));
  _mm256_storeu_si256((__m256i*)high_bytes, _mm512_cvtepi16_epi8(_mm512_permutexvar_epi16(order, high)));
  _mm256_storeu_si256((__m256i*)low_bytes, _mm512_cvtepi16_epi8(_mm512_permutexvar_epi16(order, low)));
}
#endif

// Add one group's integer sums of 16 outputs to the total of the groups before it.
template <bool HAS_MIN>
inline f16v add_group(f16v total, i16v dots, f16v scales, f16v mins, const InputGroup& inputs) {
  total += __builtin_convertvector(dots, f16v) * (scales * inputs.scale);
  if (HAS_MIN) total += mins * inputs.scaled_sum;
  return total;
}

inline int num_groups(int inputs) { return (inputs + GROUP - 1) / GROUP; }

template <int BITS>
struct Grouped {
  typedef WeightGroup<BITS> Weight;
  typedef InputGroup Input;
  static constexpr int SHARES = 16 / BITS;  // pairs of inputs in a lane
  static constexpr uint32_t MASK = BITS == 4 ? 0x000f000fu : 0x00ff00ffu;
  // The level of the cache that weights are prefetched into: with AMX the first, as measured there. Without, the second:
  // in the first one a pass of one token took 1.07 to 1.25 times as long (int4, AMD Zen 4), and in bf16 0.97 times.
#if defined(AURORA_GROUPED_TILES)
  static constexpr int PREFETCHED_TO = 3;
#else
  static constexpr int PREFETCHED_TO = 2;
#endif
  static ptrdiff_t block_size(int groups) { return groups; }

  template <int ROWS>
  static void sums(const Weight* w, const InputGroup* x, ptrdiff_t x_stride, int groups, const Stream& stream,
                   f16v (*total)[2]) {
    constexpr int CHAINS = ROWS < 3 ? 2 : 1;  // partial sums per output: with few rows, one would wait for its latency
    for (int group = 0; group < groups; ++group, ++w, ++x) {
      stream.ask<sizeof(Weight), PREFETCHED_TO>(w);
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
        const f16v scales = from_fp16(w->scales + 16 * v);
        const f16v mins = Weight::HAS_MIN ? from_fp16(w->mins + 16 * v) : f16v{};
        for (int r = 0; r < ROWS; ++r) {
          const InputGroup& inputs = x[r * x_stride];
          for (int chain = 1; chain < CHAINS; ++chain) dots[0][r][v] += dots[chain][r][v];
          total[r][v] = add_group<Weight::HAS_MIN>(total[r][v], dots[0][r][v], scales, mins, inputs);
        }
      }
    }
  }
};

}  // namespace
