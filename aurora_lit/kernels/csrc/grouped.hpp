// The grouped formats: weights of 4, 5, 6 or 8 bits with scales for every 32 or 16 inputs, as llama.cpp's Q4_1, Q5_1,
// Q6_K and Q8_0. Inputs are rounded to 8 bits with a scale per group, as llama.cpp does (Q8_1), and alike for all these
// formats, so that they can be mixed. Products are summed as integers for each scale, which is exact in any order, and
// over scales in fp32 in a fixed order. So this is as batch-invariant as the other formats, and reads a third or half as
// many bytes as bf16. Source of the formats: ggml-common.h (block_q4_1, block_q5_1, block_q6_K, block_q8_0, block_q8_1);
// of the instruction: VPDPBUSD, Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 2.
#pragma once

#include "vectors.hpp"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define AURORA_GROUPED_TILES 1  // grouped_tiles.hpp
#endif

namespace {

constexpr int GROUP = 32;  // inputs that are rounded with one scale
constexpr int LINES = GROUP / 4;  // lines of a group: each has a lane of four bytes for every output
constexpr float INPUT_LIMIT = 127;

// The input to which each byte of a group's lines belongs. Bytes 0 and 2 of a lane are neighbours, and so are 1 and 3, so
// that a pair becomes two bf16 weights by a shift.
struct LaneOrder {
  uint8_t input[GROUP];
  constexpr LaneOrder() : input() {
    for (int i = 0; i < GROUP; ++i) input[4 * line_of(i) + byte_of(i)] = uint8_t(i);
  }
  static constexpr int line_of(int input) { return input / 8 * 2 + input / 2 % 2; }
  static constexpr int byte_of(int input) { return input / 4 % 2 + input % 2 * 2; }
};
constexpr LaneOrder LANE_ORDER;

struct InputGroup {  // of one row
  int8_t values[GROUP];  // in LANE_ORDER
  float scale;
  float scaled_sum;  // scale * the sum of all values
  int32_t sums[2];   // of the values of each half
  // Sum of the values that belong to one of SCALES scales of a weight.
  template <int SCALES>
  int32_t sum(int of) const { return SCALES == 2 ? sums[of] : sums[0] + sums[1]; }
};

// One group of inputs of a block of outputs. A weight is scale * (q - OFFSET), or with minima scale * q + min. Two
// neighbouring lines share a word for their lower four bits; the bits above these are in words of their own.
template <int BITS>
struct WeightGroup {
  static constexpr bool HAS_MIN = BITS < 6;
  static constexpr int OFFSET = HAS_MIN ? 0 : 1 << (BITS - 1);
  static constexpr int SCALES = BITS == 6 ? 2 : 1;  // for equal parts of the group's inputs
  static constexpr int HIGH_BITS = BITS == 8 ? 0 : BITS - 4;
  uint16_t scales[SCALES][BLOCK];  // fp16
  uint16_t mins[HAS_MIN ? BLOCK : 0];
  uint32_t words[BLOCK / 16][GROUP * (BITS == 8 ? 8 : 4) / 32][16];
  uint32_t highs[BLOCK / 16][HIGH_BITS][16];

  // Line number `line` of the lanes from `lane` on, one byte a weight: a vector, or the word of one lane.
  template <class Lanes>
  inline __attribute__((always_inline)) Lanes bytes(int lane, int line) const {
    const auto at = [lane](const uint32_t(&of)[16]) { return reinterpret_cast<const Lanes*>(of + lane % 16); };
    const auto& of_lanes = words[lane / 16];
    if constexpr (BITS == 8) return *at(of_lanes[line]);
    const Lanes nibbles = line % 2 ? *at(of_lanes[line / 2]) >> 4 : *at(of_lanes[line / 2]);
    if constexpr (HIGH_BITS > 0) {
      constexpr int WORDS_LINES = 8 / HIGH_BITS;  // lines whose high bits share a word
      constexpr uint32_t MASK = ((1u << HIGH_BITS) - 1) * 0x10101010u;
      const Lanes high = *at(highs[lane / 16][line / WORDS_LINES]);
      const int place = HIGH_BITS * (line % WORDS_LINES);
      return join_bits(nibbles, (place < 4 ? high << (4 - place) : high >> (place - 4)) & MASK);
    }
    return nibbles & 0x0f0f0f0fu;
  }
  void ask(const Stream& stream) const { stream.ask<sizeof(WeightGroup)>(this); }
  // Store the bytes of one lane; they must be 0 before.
  void put(int lane, int line, uint32_t bytes) {
    auto& of_lanes = words[lane / 16];
    if constexpr (BITS == 8) {
      of_lanes[line][lane % 16] = bytes;
    } else {
      of_lanes[line / 2][lane % 16] |= (bytes & 0x0f0f0f0fu) << (line % 2 * 4);
      if constexpr (HIGH_BITS > 0) {
        constexpr int WORDS_LINES = 8 / HIGH_BITS;
        highs[lane / 16][line / WORDS_LINES][lane % 16] |= ((bytes & 0xf0f0f0f0u) >> 4) << (line % WORDS_LINES * HIGH_BITS);
      }
    }
  }

 private:
  // The lower four bits of each byte from `nibbles`, the others from `high`.
  template <class Lanes>
  static Lanes join_bits(Lanes nibbles, Lanes high) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Lanes) == 64)
      return (Lanes)_mm512_ternarylogic_epi32((__m512i)nibbles, (__m512i)high, _mm512_set1_epi32(0x0f0f0f0f), 0xec);
#endif
    return (nibbles & 0x0f0f0f0fu) | high;
  }
};

inline int num_groups(int inputs) { return (inputs + GROUP - 1) / GROUP; }

// Lay out codes q [outputs, inputs] with fp16 scales [outputs, scales of a row] and minima likewise, if the format has
// them. What is padded is 0.
template <int BITS>
void pack_codes(const uint8_t* codes, const uint16_t* scales, const uint16_t* mins, int outputs, int inputs,
                WeightGroup<BITS>* packed) {
  typedef WeightGroup<BITS> Group;
  const int groups = num_groups(inputs), blocks = (outputs + BLOCK - 1) / BLOCK;
  constexpr int SPAN = GROUP / Group::SCALES;  // inputs of a scale
  const int row_scales = (inputs + SPAN - 1) / SPAN;
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b)
    for (int g = 0; g < groups; ++g) {
      Group& to = packed[ptrdiff_t(b) * groups + g];
      std::memset(&to, 0, sizeof to);
      for (int lane = 0; lane < BLOCK && b * BLOCK + lane < outputs; ++lane) {
        const ptrdiff_t o = b * BLOCK + lane;
        const int count = inputs - g * GROUP < GROUP ? inputs - g * GROUP : GROUP;
        uint8_t q[GROUP] = {};
        std::memcpy(q, codes + o * inputs + g * GROUP, size_t(count));
        for (int i = 0; i < Group::SCALES && i * SPAN < count; ++i)
          to.scales[i][lane] = scales[o * row_scales + g * Group::SCALES + i];
        if constexpr (Group::HAS_MIN) to.mins[lane] = mins[o * row_scales + g];
        for (int line = 0; line < LINES; ++line) {
          uint32_t bytes = 0;
          for (int i = 0; i < 4; ++i) bytes |= uint32_t(q[LANE_ORDER.input[4 * line + i]]) << (8 * i);
          to.put(lane, line, bytes);
        }
      }
    }
}

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
// group: a half is a sum of 16 products, each at most 15 * 127 in size. Two products of weights of six bits fit 16 bits,
// and weights of eight are multiplied as two parts of four.
template <int BITS>
struct WeightLine {
#if defined(AURORA_BYTE_PAIRS)
  static constexpr bool IN_HALVES = BITS == 4;
  typedef int16_t halves __attribute__((vector_size(4 * LANES)));
  inv low, high;  // of weights of eight bits
  WeightLine() = default;
  explicit WeightLine(unv bytes) : low((inv)bytes), high{} {
    if (BITS == 8) low = low & 0x0f0f0f0f, high = (inv)(bytes >> 4) & 0x0f0f0f0f;
  }
  inv add(inv sums, int32_t inputs) const {
    const inv x = inv{} + inputs;
    if (IN_HALVES) return (inv)((halves)sums + (halves)multiply_bytes(low, x));
    sums += add_pairs(multiply_bytes(low, x), 1);
    return BITS == 8 ? sums + add_pairs(multiply_bytes(high, x), 16) : sums;
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

// Round a group of a row's inputs to integers. If an input is not finite, the scale is NaN, and so are all sums.
inline void round_group(const float* x, InputGroup* out) {
  const f16v v[2] = {*reinterpret_cast<const f16v*>(x), *reinterpret_cast<const f16v*>(x + 16)};
  const f16v size[2] = {(f16v)((u16v)v[0] & 0x7fffffffu), (f16v)((u16v)v[1] & 0x7fffffffu)};
  const f16v larger = size[0] > size[1] ? size[0] : size[1], poison = (v[0] + v[1]) * 0.0f;
  const float most = largest(larger), none = total(poison);
  out->scale = most / INPUT_LIMIT + none;
  const float factor = most > 1e-30f && out->scale == out->scale ? INPUT_LIMIT / most : 0.0f;
  for (int i = 0; i < 2; ++i) {
    const i16v q = nearest(factor > 0.0f ? v[i] * factor : f16v{});
    out->sums[i] = total(q);
    narrow8(q, LANE_ORDER.input, out->values + 16 * i);  // the order of both halves is the same
  }
  out->scaled_sum = out->scale * float(out->sum<1>(0));
}

// Add the integer sums of LANES outputs for one scale to the total of those before it.
template <bool HAS_MIN>
inline fnv add_group(fnv total, inv dots, fnv scales, fnv mins, const InputGroup& inputs) {
  total = fused(__builtin_convertvector(dots, fnv), scales * inputs.scale, total);
  return HAS_MIN ? fused(mins, inputs.scaled_sum, total) : total;
}

// A weight group of a block as it is multiplied: lines of bytes, and scales in fp32.
template <int BITS>
struct UnpackedGroup {
  unv bytes[LINES][BLOCK_VECTORS];
  fnv scales[WeightGroup<BITS>::SCALES][BLOCK_VECTORS];
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
  static constexpr int MAX_ROWS = 6;  // their sums fill the registers
  // The level of the cache that weights are prefetched into: with AMX the first, as measured there. Without, the second:
  // in the first one a pass of one token took 1.07 to 1.25 times as long (int4, AMD Zen 4), and in bf16 0.97 times.
#if defined(AURORA_GROUPED_TILES)
  static constexpr int PREFETCHED_TO = 3;
#else
  static constexpr int PREFETCHED_TO = 2;
#endif
  static ptrdiff_t block_size(int groups) { return groups; }
  // Vectors of a block that are multiplied at a time, partial sums of an output, which do not wait for each other, and
  // pairs of lines that are unrolled; of narrower vectors, which are more, that would be too much code.
#if defined(__AVX512F__)
  static constexpr int UNROLLED_PAIRS = LINES / 2;
  static constexpr int part_of(int) { return BLOCK_VECTORS; }
  static constexpr int chains_of(int rows) { return rows < 3 ? 2 : 1; }
#else
  static constexpr int UNROLLED_PAIRS = 1;
  static constexpr int part_of(int rows) { return rows < 3 ? BLOCK_VECTORS : 2; }
  static constexpr int chains_of(int rows) { return LANES == 8 && rows == 1 ? 2 : 1; }
#endif
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
    constexpr int PART = part_of(ROWS), CHAINS = chains_of(ROWS), SCALES = Weight::SCALES;
    const Weight& packed = *block.packed;
#pragma GCC unroll 2
    for (int scale = 0; scale < SCALES; ++scale) {
      inv dots[CHAINS][ROWS][PART] = {};
      for (int r = 0; r < ROWS && Weight::OFFSET; ++r)
        for (int v = 0; v < PART; ++v)
          dots[0][r][v] = inv{} - Weight::OFFSET * x[r * x_stride].template sum<SCALES>(scale);
#pragma GCC unroll UNROLLED_PAIRS
      for (int first = 0; first < LINES / SCALES; first += 2)
        for (int n = 0; n < 2; ++n) {
          const int line = scale * (LINES / SCALES) + first + n;
          WeightLine<BITS> weights[PART];
          for (int v = 0; v < PART; ++v) {
            const unv bytes = READS == Reads::UNPACKED ? block.unpacked->bytes[line][FIRST + v]
                                                       : packed.template bytes<unv>(LANES * (FIRST + v), line);
            if (READS == Reads::PACKED_AND_UNPACKS) block.unpacked->bytes[line][FIRST + v] = bytes;
            weights[v] = WeightLine<BITS>(bytes);
          }
          for (int r = 0; r < ROWS; ++r) {
            int32_t inputs;
            std::memcpy(&inputs, x[r * x_stride].values + 4 * line, 4);
            for (int v = 0; v < PART; ++v) dots[n % CHAINS][r][v] = weights[v].add(dots[n % CHAINS][r][v], inputs);
          }
        }
      for (int v = 0, at = FIRST; v < PART; ++v, ++at) {
        fnv scales, mins = {};
        if (READS == Reads::UNPACKED) {
          scales = block.unpacked->scales[scale][at];
          if (Weight::HAS_MIN) mins = block.unpacked->mins[at];
        } else {
          scales = from_fp16(packed.scales[scale] + LANES * at);
          if (Weight::HAS_MIN) mins = from_fp16(packed.mins + LANES * at);
        }
        if (READS == Reads::PACKED_AND_UNPACKS) {
          block.unpacked->scales[scale][at] = scales;
          if (Weight::HAS_MIN) block.unpacked->mins[at] = mins;
        }
        for (int r = 0; r < ROWS; ++r) {
          inv sum = WeightLine<BITS>::whole(dots[0][r][v]);
          for (int chain = 1; chain < CHAINS; ++chain) sum += WeightLine<BITS>::whole(dots[chain][r][v]);
          total[r][at] = add_group<Weight::HAS_MIN>(total[r][at], sum, scales, mins, x[r * x_stride]);
        }
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
