// The split format: the grouped format of 8 bits (grouped.hpp) with the high four bits of a block's codes stored before
// their low four bits. The high halves alone give an approximate product for half of the reading (screen.hpp). Both
// products are those of Grouped<8> over a block that is joined in the cache first, so the whole one has the bits of that
// format.
//
// Every output is stored with a bound of the approximation's error. For weights w and x as rounded for the product, let c
// be the weights whose codes have 8 as their low half, and G the number of groups. Then the computed outputs differ by
// less than |x| (|w - c| + 4 (G + 4) 2^-24 max(|w|, |c|)):
// - the exact ones by w.x - c.x = (w - c).x, at most |w - c| |x| (Cauchy and Schwarz);
// - sums within a group are exact integers. A group's term and the sum of all terms are rounded at most G + 2 times in
//   fp32, each time by a factor within 1 +- 2^-24, so the error of w.x is at most about (G + 2) 2^-24 times the sum of the
//   terms' sizes, which is at most |w| |x| (Cauchy and Schwarz twice); likewise that of c.x. That takes half of the
//   second summand. The other half covers that the bounds, output +- error, are themselves rounded to fp32.
// This holds without overflow and underflow, for which screen.hpp cares.
#pragma once

#include "matmul.hpp"

namespace {

struct HighHalves {  // of a group of a block; lines as in WeightGroup<8>, two neighbouring ones in a word
  uint16_t scales[BLOCK];  // fp16
  uint32_t words[BLOCK / 16][LINES / 2][16];
};
struct LowHalves {
  uint32_t words[BLOCK / 16][LINES / 2][16];
};

// A block: the bounds of its outputs' errors per |x|, then the high halves of all groups, then the low ones.
struct SplitBlock {
  float* errors;  // [BLOCK]
  HighHalves* highs;
  LowHalves* lows;

  static ptrdiff_t bytes(int groups) {
    return ptrdiff_t(BLOCK * sizeof(float)) + groups * ptrdiff_t(sizeof(HighHalves) + sizeof(LowHalves));
  }
  // Number b of a weight.
  SplitBlock(const void* weight, int groups, ptrdiff_t b) {
    char* begin = static_cast<char*>(const_cast<void*>(weight)) + b * bytes(groups);
    errors = reinterpret_cast<float*>(begin);
    highs = reinterpret_cast<HighHalves*>(errors + BLOCK);
    lows = reinterpret_cast<LowHalves*>(highs + groups);
  }
};

// A word of high halves has those of the first line in the upper half of each byte, a word of low halves in the lower one.
constexpr uint32_t UPPER = 0xf0f0f0f0u, LOWER = 0x0f0f0f0fu;
template <class Lanes>
inline Lanes high_line(int line, Lanes high) {
  return (line % 2 ? high << 4 : high) & UPPER;
}
template <class Lanes>
inline Lanes whole_line(int line, Lanes high, Lanes low) {
  return high_line(line, high) | ((line % 2 ? low >> 4 : low) & LOWER);
}

// Lay out codes q [outputs, inputs] with fp16 scales [outputs, groups].
inline void pack_split(const uint8_t* codes, const uint16_t* scales, int outputs, int inputs, void* packed) {
  const int groups = num_groups(inputs), blocks = num_blocks(outputs);
  std::vector<WeightGroup<8>> joined(size_t(blocks) * groups);
  pack_codes<8>(codes, scales, nullptr, outputs, inputs, joined.data());
#pragma omp parallel for schedule(static)
  for (int b = 0; b < blocks; ++b) {
    const SplitBlock to(packed, groups, b);
    double errors[BLOCK] = {}, sizes[BLOCK] = {}, coarse_sizes[BLOCK] = {};  // squares
    for (int g = 0; g < groups; ++g) {
      const WeightGroup<8>& from = joined[size_t(b) * groups + g];
      std::memcpy(to.highs[g].scales, from.scales, sizeof from.scales);
      for (int lane = 0; lane < BLOCK; ++lane) {
        const double scale = from_fp16(from.scales[0] + lane / LANES * LANES)[lane % LANES];
        for (int line = 0; line < LINES; line += 2) {
          const uint32_t first = from.words[lane / 16][line][lane % 16];
          const uint32_t second = from.words[lane / 16][line + 1][lane % 16];
          to.highs[g].words[lane / 16][line / 2][lane % 16] = (first & UPPER) | (second & UPPER) >> 4;
          to.lows[g].words[lane / 16][line / 2][lane % 16] = (first & LOWER) | (second & LOWER) << 4;
        }
        for (int at = 0; at < GROUP; ++at) {
          if (g * GROUP + LANE_ORDER.input[at] >= inputs) continue;
          const int q = int(from.words[lane / 16][at / 4][lane % 16] >> (8 * (at % 4)) & 0xffu), low = q % 16;
          const double error = scale * (low - 8), size = scale * (q - 128), coarse = scale * (q - low + 8 - 128);
          errors[lane] += error * error, sizes[lane] += size * size, coarse_sizes[lane] += coarse * coarse;
        }
      }
    }
    for (int lane = 0; lane < BLOCK; ++lane) {
      const double size = std::sqrt(sizes[lane] > coarse_sizes[lane] ? sizes[lane] : coarse_sizes[lane]);
      to.errors[lane] = float(1.0001 * std::sqrt(errors[lane]) + 4 * (groups + 4) * 0x1p-24 * size);
    }
  }
}

// Groups of a weight as tiles read them.
struct SplitGroups {
  const void* weight;
  int groups;  // of a block

  struct Group {
    static constexpr bool HAS_MIN = false;
    static constexpr int SCALES = 1, OFFSET = 128;
    const uint16_t (*scales)[BLOCK];
    const HighHalves* high;
    const LowHalves* low;

    template <class Lanes>
    inline __attribute__((always_inline)) Lanes bytes(int lane, int line) const {
      const auto at = [&](const auto& words) {
        return *reinterpret_cast<const Lanes*>(words[lane / 16][line / 2] + lane % 16);
      };
      return whole_line(line, at(high->words), at(low->words));
    }
    void ask(const Stream& stream) const {
      stream.ask<sizeof(HighHalves)>(high);
      stream.ask<sizeof(LowHalves)>(low);
    }
  };
  Group at(int b, int group) const {
    const SplitBlock block(weight, groups, b);
    return {&block.highs[group].scales, &block.highs[group], &block.lows[group]};
  }
};

// The product for a few rows; WHOLE: false: the approximate one, for which codes have 8 as their low half.
template <bool WHOLE>
struct SplitInt8 {
  typedef SplitBlock Weight;
  typedef InputGroup Input;
  typedef Grouped<8> Same;
  static constexpr int MAX_ROWS = Same::MAX_ROWS, OFFSET = WHOLE ? 128 : 128 - 8;
  static ptrdiff_t block_size(int) { return 0; }  // each block is passed by itself

  template <int ROWS>
  static void sums(const SplitBlock* block, const InputGroup* x, ptrdiff_t x_stride, int groups, const Stream& stream,
                   fnv (*total)[BLOCK_VECTORS]) {
    constexpr int PART = Same::part_of(ROWS);
    const ptrdiff_t ahead = stream.next - reinterpret_cast<const char*>(block->errors);
    if (!WHOLE) prefetch<Same::PREFETCHED_TO>(stream.next, BLOCK * int(sizeof(float)));
    for (int g = 0; g < groups; ++g, ++x) {
      const HighHalves& high = block->highs[g];
      const LowHalves& low = block->lows[g];
      if (WHOLE) {
        stream.ask<sizeof high, Same::PREFETCHED_TO>(&high);
        stream.ask<sizeof low, Same::PREFETCHED_TO>(&low);
      } else {  // the next block's
        prefetch<Same::PREFETCHED_TO>(reinterpret_cast<const char*>(&high) + ahead, int(sizeof high));
      }
#pragma GCC unroll 2
      for (int first = 0; first < BLOCK_VECTORS; first += PART) {
        inv dots[ROWS][PART];
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < PART; ++v) dots[r][v] = inv{} - OFFSET * x[r * x_stride].template sum<1>(0);
#pragma GCC unroll 8
        for (int line = 0; line < LINES; ++line) {
          WeightLine<8> weights[PART];
          for (int v = 0; v < PART; ++v) {
            const int lane = LANES * (first + v);
            const unv highs = *reinterpret_cast<const unv*>(high.words[lane / 16][line / 2] + lane % 16);
            if (WHOLE) {
              const unv lows = *reinterpret_cast<const unv*>(low.words[lane / 16][line / 2] + lane % 16);
              weights[v] = WeightLine<8>(whole_line(line, highs, lows));
            } else {
              weights[v] = WeightLine<8>(high_line(line, highs));
            }
          }
          for (int r = 0; r < ROWS; ++r) {
            int32_t inputs;
            std::memcpy(&inputs, x[r * x_stride].values + 4 * line, 4);
            for (int v = 0; v < PART; ++v) dots[r][v] = weights[v].add(dots[r][v], inputs);
          }
        }
        for (int v = 0; v < PART; ++v) {
          const fnv scales = from_fp16(high.scales + LANES * (first + v));
          for (int r = 0; r < ROWS; ++r) {
            const inv sum = WeightLine<8>::whole(dots[r][v]);
            total[r][first + v] = add_group<false>(total[r][first + v], sum, scales, fnv{}, x[r * x_stride]);
          }
        }
      }
    }
  }
};

// The approximate one is for rows that are not on tiles.
template <bool WHOLE>
struct Product<SplitInt8<WHOLE>> : GroupedInputs {
  static ptrdiff_t block_bytes(int groups) { return SplitBlock::bytes(groups); }
  static void enter(int rows) { Product<Grouped<8>>::enter(rows); }
  static void blocks(const InputGroup* x, int groups, int rows, const void* w, int outputs, const Stream& stream,
                     float* y, const float* bias, bool add, int from, int to) {
#if defined(AURORA_GROUPED_TILES)
    if (WHOLE && on_tiles(rows))
      return linear_grouped_tiles(tiles_of(x), groups, rows, SplitGroups{w, groups}, outputs, stream, y, bias, add, from,
                                  to);
#endif
    for (int b = from; b < to; ++b) {
      const SplitBlock block(w, groups, b);
      linear_blocks<SplitInt8<WHOLE>>(x, groups, rows, &block, groups, outputs, stream, y, bias, add, b, b + 1);
    }
  }
};

}  // namespace
