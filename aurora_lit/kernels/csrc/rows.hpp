// Rows of a packed weight, read one by one with the values that the products multiply by: a head may then be the
// embedding as well, and needs no second copy.
#pragma once

#include "split.hpp"

namespace {

// A table of rows of any format.
struct RowTable {
  const void* data;
  void (*read)(const void* data, int64_t width, int64_t index, float* to);  // row `index` as fp32
  void row(int64_t width, int64_t index, float* to) const { read(data, width, index, to); }
};

template <class Format>
struct Rows;

template <>
struct Rows<Fp32> {
  static void read(const void* packed, int64_t width, int64_t index, float* to) {
    const float* from = static_cast<const float*>(packed) + index / BLOCK * BLOCK * width + index % BLOCK;
    for (int64_t k = 0; k < width; ++k) to[k] = from[k * BLOCK];
  }
};

template <>
struct Rows<Bf16> {
  static void read(const void* packed, int64_t width, int64_t index, float* to) {
    const int64_t padded = Product<Bf16>::padded(int(width));
    const uint16_t* from = static_cast<const uint16_t*>(packed) + index / BLOCK * BLOCK * padded + index % BLOCK * 2;
    for (int64_t k = 0; k < width; ++k) to[k] = from_bf16(from[k / 2 * 2 * BLOCK + k % 2]);
  }
};

template <int BITS>
struct Rows<Grouped<BITS>> {
  static void read(const void* packed, int64_t width, int64_t index, float* to) {
    typedef WeightGroup<BITS> Weight;
    const int in_block = int(index % BLOCK);
    const Weight* group = static_cast<const Weight*>(packed) + index / BLOCK * num_groups(int(width));
    const auto of_row = [&](const uint16_t* from) {
      return from_fp16(from + in_block / LANES * LANES)[in_block % LANES];
    };
    for (int64_t first = 0; first < width; first += GROUP, ++group)
      for (int line = 0; line < LINES; ++line) {
        const float scale = of_row(group->scales[line * Weight::SCALES / LINES]);
        const float min = Weight::HAS_MIN ? of_row(group->mins) : -float(Weight::OFFSET) * scale;
        const uint32_t bytes = group->template bytes<uint32_t>(in_block, line);
        for (int i = 0; i < 4; ++i) {
          const int64_t input = first + LANE_ORDER.input[4 * line + i];
          const float q = float(bytes >> (8 * i) & 0xffu);
          if (input < width) to[input] = scale * q + min;  // the product is exact: 11 bits times BITS
        }
      }
  }
};

template <>
struct Rows<SplitInt8<true>> {
  static void read(const void* packed, int64_t width, int64_t index, float* to) {
    const SplitBlock block(packed, num_groups(int(width)), index / BLOCK);
    const int half = int(index % BLOCK / 16), lane = int(index % 16);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t g = i / GROUP;
      const int line = LaneOrder::line_of(int(i % GROUP)), shift = 8 * LaneOrder::byte_of(int(i % GROUP));
      const uint32_t high = block.highs[g].words[half][line / 2][lane], low = block.lows[g].words[half][line / 2][lane];
      const float scale = from_fp16(block.highs[g].scales + index % BLOCK / LANES * LANES)[index % LANES];
      to[i] = scale * (float(whole_line(line, high, low) >> shift & 0xffu) - 128.0f);
    }
  }
};

#if defined(AURORA_INT8_TILES)
template <>
struct Rows<Int8PerOutput> {
  static void read(const void* packed, int64_t width, int64_t index, float* to) {
    const int groups = Product<Int8PerOutput>::padded(int(width)), in_block = int(index % BLOCK);
    const int8_t* block = static_cast<const int8_t*>(packed) + index / BLOCK * int8_block_bytes(groups);
    float scale;
    std::memcpy(&scale, block + in_block * sizeof(float), sizeof scale);
    const int8_t* q = block + BLOCK * sizeof(float);
    for (int64_t k = 0; k < width; ++k) {
      const int64_t group = k / INT8_GROUP, line = k % INT8_GROUP / 4;
      const int64_t vector = (group * 2 + in_block / 16) * (INT8_GROUP / 4) + line;
      to[k] = scale * float(q[(vector * 16 + in_block % 16) * 4 + k % 4]);
    }
  }
};
#endif

// Reads `count` of the table's `rows` rows; 0, and nothing is read, if an index is none of them.
template <class Format>
int read_rows(const void* packed, int64_t rows, int64_t width, const int64_t* indices, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= rows) return 0;
#pragma omp parallel for schedule(static) if (count > 1024)
  for (int64_t i = 0; i < count; ++i) Rows<Format>::read(packed, width, indices[i], to + i * width);
  return 1;
}

// A table that is stored row by row.
inline void read_plain_row(const void* table, int64_t width, int64_t index, float* to) {
  std::memcpy(to, static_cast<const float*>(table) + index * width, size_t(width) * sizeof(float));
}

}  // namespace
