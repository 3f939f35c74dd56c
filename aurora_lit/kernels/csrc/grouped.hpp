// The grouped formats: weights of 4 or 8 bits with a scale for every 32 inputs, as llama.cpp's Q4_1 and Q8_0. Inputs
// are rounded to 8 bits with a scale per group, as llama.cpp does (Q8_1). Products are summed as integers within a
// group, which is exact in any order, and over groups in fp32 in a fixed order. So this is as batch-invariant as the
// other formats, and reads a third or half as many bytes as bf16. kernels/quantization.py packs the weights. Source of
// the formats: ggml-common.h (block_q4_1, block_q8_0, block_q8_1); of the instruction: VPDPBUSD, Intel 64 and IA-32
// Architectures Software Developer's Manual, vol. 2.
#pragma once

#include "vectors.hpp"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define AURORA_GROUPED_TILES 1  // four_bit_tiles.hpp, eight_bit_tiles.hpp
#endif

namespace {

constexpr int GROUP = 32;  // inputs that share a scale
constexpr float INPUT_LIMIT = 127;

struct InputGroup {  // of one row
  int8_t values[GROUP];  // in the order of a weight's bytes (LANE_ORDER)
  float scale;
  int32_t sum;       // of the values
  float scaled_sum;  // scale * sum
};

// One group of inputs of a block of outputs. A 32-bit lane belongs to one output and holds pairs of neighbouring
// inputs, one in each half: inputs 2n and 2n + 1 of the lane are at bit BITS * n of the two halves.
template <int BITS>
struct WeightGroup {
  static constexpr bool HAS_MIN = BITS == 4;  // 8-bit weights are symmetric around 128
  uint16_t scales[BLOCK];                     // fp16
  uint16_t mins[HAS_MIN ? BLOCK : 0];
  uint32_t words[BLOCK / 16][GROUP * BITS / 32][16];
};

// LANES values of fp16 as fp32; exact, for finite numbers only.
inline fnv from_fp16(const uint16_t* from) {
#if defined(__AVX512F__)
  return (fnv)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (fnv)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  const unv h = (unv)load_lanes(from);  // in the upper half of each lane
  const fnv size = (fnv)((h & 0x7fff0000u) >> 3) * 0x1p112f;
  return (fnv)((unv)size | (h & 0x80000000u));
#endif
}

// Sums of unsigned bytes times signed ones, which an instruction adds four at a time, or two at a time in 16 bits.
#if defined(__AVX512VNNI__)
#define AURORA_BYTE_PRODUCTS 1
inline inv add_four(inv sums, inv w, inv x) { return (inv)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x); }
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
#define AURORA_BYTE_PRODUCTS 1
inline inv add_four(inv sums, inv w, inv x) {
  return (inv)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
}
#elif defined(__AVX512BW__)
#define AURORA_BYTE_PRODUCTS 1
#define AURORA_BYTE_PAIRS 1
inline inv multiply_bytes(inv w, inv x) { return (inv)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
inline inv add_pairs(inv x, int factor) {  // the sums of two neighbouring numbers of 16 bits, times a factor
  return (inv)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(int16_t(factor)));
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define AURORA_BYTE_PRODUCTS 1
#define AURORA_BYTE_PAIRS 1
inline inv multiply_bytes(inv w, inv x) { return (inv)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
inline inv add_pairs(inv x, int factor) {
  return (inv)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(int16_t(factor)));
}
#else
inline inv add_four(inv sums, inv w, inv x) {
  for (int shift = 0; shift < 32; shift += 8)
    sums += (inv)(((unv)w >> shift) & 0xffu) * ((inv)((unv)x << (24 - shift)) >> 24);
  return sums;
}
#endif

// A line of weights for LANES outputs, four bytes each, as it is multiplied by the inputs of a row. An output's sum of
// products has 32 bits. With instructions for pairs and weights of four bits it has two halves of 16 until the end of a
// group: a half is a sum of 16 products, each at most 15 * 127 in size.
template <int BITS>
struct WeightLine {
#if defined(AURORA_BYTE_PAIRS)
  static constexpr bool IN_HALVES = BITS == 4;
  typedef int16_t halves __attribute__((vector_size(4 * LANES)));
  inv low, high;  // of weights of eight bits
  WeightLine() = default;
  explicit WeightLine(unv bytes) : low((inv)bytes), high{} {
    if (!IN_HALVES) low = low & 0x0f0f0f0f, high = (inv)(bytes >> 4) & 0x0f0f0f0f;
  }
  inv add(inv sums, int32_t inputs) const {
    const inv x = inv{} + inputs;
    if (IN_HALVES) return (inv)((halves)sums + (halves)multiply_bytes(low, x));
    return sums + add_pairs(multiply_bytes(low, x), 1) + add_pairs(multiply_bytes(high, x), 16);
  }
  static inv whole(inv sums) { return IN_HALVES ? add_pairs(sums, 1) : sums; }
#else
  inv bytes;
  WeightLine() = default;
  explicit WeightLine(unv bytes) : bytes((inv)bytes) {}
  inv add(inv sums, int32_t inputs) const { return add_four(sums, bytes, inv{} + inputs); }
  static inv whole(inv sums) { return sums; }
#endif
};

// The input to which each byte of a weight group belongs, after each line of lanes is split into lines of bytes.
template <int BITS>
struct LaneOrder {
  uint8_t input[GROUP];
  constexpr LaneOrder() : input() {
    constexpr int SPAN = 32 / BITS;  // inputs of a line of lanes
    for (int i = 0; i < GROUP; ++i) {
      const int pair = i % SPAN / 2, half = i % 2;
      const int piece = BITS == 4 ? pair % 2 : 0, byte = BITS == 4 ? pair / 2 : pair;
      input[i / SPAN * SPAN + 4 * piece + 2 * half + byte] = uint8_t(i);
    }
  }
};
template <int BITS>
constexpr LaneOrder<BITS> LANE_ORDER;

// Round a group of a row's inputs to integers. If an input is not finite, the scale is NaN, and so are all sums.
template <int BITS>
inline void round_group(const float* x, InputGroup* out) {
  const f16v v[2] = {*reinterpret_cast<const f16v*>(x), *reinterpret_cast<const f16v*>(x + 16)};
  const f16v size[2] = {(f16v)((u16v)v[0] & 0x7fffffffu), (f16v)((u16v)v[1] & 0x7fffffffu)};
  const f16v larger = size[0] > size[1] ? size[0] : size[1], poison = (v[0] + v[1]) * 0.0f;
  const float most = largest(larger), none = total(poison);
  out->scale = most / INPUT_LIMIT + none;
  const float factor = most > 1e-30f && out->scale == out->scale ? INPUT_LIMIT / most : 0.0f;
  i16v sums = {};
  for (int i = 0; i < 2; ++i) {
    const i16v q = nearest(factor > 0.0f ? v[i] * factor : f16v{});
    sums += q;
    narrow8(q, LANE_ORDER<BITS>.input, out->values + 16 * i);  // the order of all groups of 16 is the same
  }
  out->sum = total(sums);
  out->scaled_sum = out->scale * float(out->sum);
}

// Add one group's integer sums of LANES outputs to the total of the groups before it.
template <bool HAS_MIN>
inline fnv add_group(fnv total, inv dots, fnv scales, fnv mins, const InputGroup& inputs) {
  total = fused(__builtin_convertvector(dots, fnv), scales * inputs.scale, total);
  return HAS_MIN ? fused(mins, inputs.scaled_sum, total) : total;
}

inline int num_groups(int inputs) { return (inputs + GROUP - 1) / GROUP; }

// A weight group of a block as it is multiplied: lines of bytes, and scales in fp32.
template <int BITS>
struct UnpackedGroup {
  unv bytes[GROUP / 4][BLOCK_VECTORS];
  fnv scales[BLOCK_VECTORS];
  fnv mins[WeightGroup<BITS>::HAS_MIN ? BLOCK_VECTORS : 0];
};

// A block's groups. The first rows that are multiplied by it unpack it on the way; further ones read what these stored.
template <int BITS>
struct UnpackedBlock {
  const WeightGroup<BITS>* packed;
  UnpackedGroup<BITS>* unpacked;
};

enum class Reads { PACKED, PACKED_AND_UNPACKS, UNPACKED };

template <int BITS>
struct Grouped {
  typedef WeightGroup<BITS> Weight;
  typedef InputGroup Input;
  static constexpr int PIECES = 8 / BITS;  // lines of bytes in a line of lanes
  static constexpr int MAX_ROWS = 6;  // their sums fill the registers
  // The level of the cache that weights are prefetched into: with AMX the first, as measured there. Without, the second:
  // in the first one a pass of one token took 1.07 to 1.25 times as long (int4, AMD Zen 4), and in bf16 0.97 times.
#if defined(AURORA_GROUPED_TILES)
  static constexpr int PREFETCHED_TO = 3;
#else
  static constexpr int PREFETCHED_TO = 2;
#endif
  static ptrdiff_t block_size(int groups) { return groups; }
  // Vectors of a block that are multiplied at a time, and partial sums of an output, which do not wait for each other.
#if defined(__AVX512F__)
  static constexpr int part_of(int) { return BLOCK_VECTORS; }
  static constexpr int chains_of(int rows) { return rows < 3 ? 2 : 1; }
#else
  static constexpr int part_of(int rows) { return rows < 3 ? BLOCK_VECTORS : 2; }
  static constexpr int chains_of(int rows) { return LANES == 8 && rows == 1 ? 2 : 1; }
#endif
  // The weights of a line of lanes that are its n-th line of bytes.
  template <class Vector>
  static Vector piece(Vector lanes, int n) { return BITS == 8 ? lanes : (lanes >> (4 * n)) & 0x0f0f0f0fu; }

  template <int ROWS>
  static void sums(const Weight* w, const InputGroup* x, ptrdiff_t x_stride, int groups, const Stream& stream,
                   fnv (*total)[BLOCK_VECTORS]) {
    add_groups<ROWS, Reads::PACKED>({w, nullptr}, x, x_stride, groups, stream, total);
  }

  // The same bits, whatever is read.
  template <int ROWS, Reads READS>
  static void add_groups(UnpackedBlock<BITS> block, const InputGroup* x, ptrdiff_t x_stride, int groups,
                         const Stream& stream, fnv (*total)[BLOCK_VECTORS]) {
    for (int group = 0; group < groups; ++group, ++block.packed, ++x) {
      if (READS != Reads::UNPACKED) stream.ask<sizeof(Weight), PREFETCHED_TO>(block.packed);
      add_parts<ROWS, READS>(block, x, x_stride, total);
      if (READS != Reads::PACKED) ++block.unpacked;
    }
  }

 private:
  // Add a group's products to the totals, from vector FIRST of the block on.
  template <int ROWS, Reads READS, int FIRST = 0>
  static inline __attribute__((always_inline)) void add_parts(const UnpackedBlock<BITS>& block, const InputGroup* x,
                                                              ptrdiff_t x_stride, fnv (*total)[BLOCK_VECTORS]) {
    constexpr int PART = part_of(ROWS), CHAINS = chains_of(ROWS), HALF_VECTORS = BLOCK_VECTORS / 2;
    const Weight& packed = *block.packed;
    inv dots[CHAINS][ROWS][PART] = {};
    for (int r = 0; r < ROWS && !Weight::HAS_MIN; ++r)
      for (int v = 0; v < PART; ++v) dots[0][r][v] = inv{} - 128 * x[r * x_stride].sum;
    for (int line = 0; line < GROUP * BITS / 32; ++line) {
      unv lanes[PART];
      for (int v = 0, at = FIRST; v < PART && READS != Reads::UNPACKED; ++v, ++at)
        lanes[v] = *reinterpret_cast<const unv*>(packed.words[at / HALF_VECTORS][line] + at % HALF_VECTORS * LANES);
      for (int n = 0; n < PIECES; ++n) {
        const int place = line * PIECES + n;
        WeightLine<BITS> weights[PART];
        for (int v = 0; v < PART; ++v) {
          const unv bytes = READS == Reads::UNPACKED ? block.unpacked->bytes[place][FIRST + v] : piece(lanes[v], n);
          if (READS == Reads::PACKED_AND_UNPACKS) block.unpacked->bytes[place][FIRST + v] = bytes;
          weights[v] = WeightLine<BITS>(bytes);
        }
        for (int r = 0; r < ROWS; ++r) {
          int32_t inputs;
          std::memcpy(&inputs, x[r * x_stride].values + 4 * place, 4);
          for (int v = 0; v < PART; ++v)
            dots[place % CHAINS][r][v] = weights[v].add(dots[place % CHAINS][r][v], inputs);
        }
      }
    }
    for (int v = 0, at = FIRST; v < PART; ++v, ++at) {
      fnv scales, mins = {};
      if (READS == Reads::UNPACKED) {
        scales = block.unpacked->scales[at];
        if (Weight::HAS_MIN) mins = block.unpacked->mins[at];
      } else {
        scales = from_fp16(packed.scales + LANES * at);
        if (Weight::HAS_MIN) mins = from_fp16(packed.mins + LANES * at);
      }
      if (READS == Reads::PACKED_AND_UNPACKS) {
        block.unpacked->scales[at] = scales;
        if (Weight::HAS_MIN) block.unpacked->mins[at] = mins;
      }
      for (int r = 0; r < ROWS; ++r) {
        inv sum = WeightLine<BITS>::whole(dots[0][r][v]);
        for (int chain = 1; chain < CHAINS; ++chain) sum += WeightLine<BITS>::whole(dots[chain][r][v]);
        total[r][at] = add_group<Weight::HAS_MIN>(total[r][at], sum, scales, mins, x[r * x_stride]);
      }
    }
    if constexpr (FIRST + PART < BLOCK_VECTORS) {
      asm volatile("" ::: "memory");  // else GCC keeps all inputs of the group in memory, for all parts
      add_parts<ROWS, READS, FIRST + PART>(block, x, x_stride, total);
    }
  }
};

// Grouped weights for many rows: a block is unpacked once for all of them.
template <int BITS, Reads READS>
struct ManyRows {
  typedef UnpackedBlock<BITS> Weight;
  typedef InputGroup Input;
  static constexpr int MAX_ROWS = Grouped<BITS>::MAX_ROWS;
  template <int ROWS>
  static void sums(const Weight* block, const InputGroup* x, ptrdiff_t x_stride, int groups, const Stream& stream,
                   fnv (*total)[BLOCK_VECTORS]) {
    Grouped<BITS>::template add_groups<ROWS, READS>(*block, x, x_stride, groups, stream, total);
  }
};

}  // namespace
